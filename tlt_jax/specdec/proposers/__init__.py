"""What proposes tokens: a learned drafter, matches of earlier text."""
