"""The fixed prompts on which speed is measured."""

CHAT = (
    "Count from one to twenty, separated by commas.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain in simple words why the sky looks blue during the day and red at dusk.",
    "What is 17 + 25? Think step by step and end with a line 'Answer: '.",
    "List five things to pack for a weekend in the mountains and say why each helps.",
    "Translate into French: The train leaves at nine and arrives before noon.",
    (
        "A shop sells pencils in boxes of 12. Ana buys 4 boxes and gives away 9 "
        "pencils, then shares the rest equally among 3 friends. How many pencils does "
        "each friend get? Show every step of the calculation."
    ),
    "Write a Python function that returns the n-th Fibonacci number.",
)

ARITHMETIC = (
    "What is 7 times 8? Think step by step, then end with a line 'Answer: '.",
    "What is 6 + 9? Think step by step, then end with a line 'Answer: '.",
    "What is 4 times 3? Think step by step, then end with a line 'Answer: '.",
    "What is 8 + 5? Think step by step, then end with a line 'Answer: '.",
)


def as_messages(text: str) -> list[dict[str, str]]:
    """Wraps a prompt as the single user turn of a chat."""
    return [{"role": "user", "content": text}]
