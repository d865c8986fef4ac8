"""Everyday requests to a chat model: prompts without a right answer.

They are made of templates and topics, so that nothing need be downloaded. Held-out
requests have topics that no training request has.
"""

import itertools
import random

from tlt_jax import types
from tlt_jax.rl.tasks import generated

_TEMPLATES = """
Explain {} to a ten-year-old.
Write a short story about {}.
What are three interesting facts about {}?
Give me some advice on how to learn about {}.
Write a poem about {}.
Summarise the history of {} in one paragraph.
What are the advantages and disadvantages of {}?
Write a friendly email to a colleague about {}.
List five questions that a beginner might ask about {}.
Compare {} with something similar.
Why is {} important?
Describe {} step by step.
""".strip().splitlines()
_TOPICS = """
rain; bicycles; bread; the moon; chess; volcanoes; libraries; bees; trains; music;
gardening; the ocean; photography; gravity; coffee; robots; bridges; football; money;
dinosaurs; painting; electricity; the heart; languages; maps; clocks; forests; cooking;
computers; sleep; dogs; deserts; telescopes; markets; dancing; vaccines; rivers; glass;
folk tales; swimming; energy; schools; mountains; stars; cheese; ships; memory; salt;
algebra; cities; birds; writing; tea; earthquakes; newspapers; running; cotton; games;
the internet; cats; plastic; islands; theatre; snow; recycling; airplanes; voting;
friendship; insects; museums; soap; horses; radio; probability; wine; light; camping
""".replace("\n", " ").split(";")
_HELD_OUT_TOPICS = 16


# What `everyday` asks besides: {t} and {u} are topics, {a} says for whom, {h} how, {n}
# and {m} are numbers, {p} and {q} people, {o} things that are counted.
_FORMS = """
Explain {t} to {a}{h}.
Write a short story about {t} for {a}.
Write a poem of {n} lines about {t}.
Tell me {n} facts about {t}{h}.
Give {a} advice on how to begin with {t}{h}.
What is the connection between {t} and {u}?
Compare {t} and {u}{h}.
Write a dialogue between {p} and {q} about {t}.
{p} is afraid of {t}. What would you say{h}?
Draft an email in which {p} asks {q} for help with {t}.
Make a plan of {n} days to learn about {t}.
Summarise what {a} should know about {t}{h}.
What are common mistakes with {t}, and how are they avoided?
Write an introduction to an article on {t}{h}.
Argue for and against {t} in the lives of {a}.
List {n} words that have to do with {t} and use each in a sentence.
Write the first paragraph of a novel in which {t} and {u} meet.
Answer as a teacher: why do people care about {t}?
Invent a riddle about {t} and give its answer.
How would the world change without {t}?
Describe a day in the life of {p}, who works with {t}.
Write a Python function that has to do with {t}, and explain it.
Translate into plain English for {a}: the theory of {t}.
What should I ask an expert on {t}{h}?
Suggest a title and an outline of {n} chapters for a book on {t}.
Write a product description for something that joins {t} and {u}.
Is {t} older than {u}? Think about it and explain.
Give step-by-step instructions about {t} for {a}.
Continue this: "When {p} first saw {t}, "
Continue this: "{q} never believed in {t} until "
Write a letter from {p} to {q}, who moved away because of {t}.
What do {t} and {u} have in common? Name {n} things.
{p} has {n} {o} and gives {m} of them to {q}. How many are left? Show each step.
{p} buys {n} boxes of {m} {o} each. How many {o} are there? Show your work.
{p} sells {o} for {n} dollars each. What do {m} of them cost? Work it out in steps.
{p} has {n} {o}, {q} has {m} more. How many have they together? Think step by step.
{p} asks: which is larger, {n} times {m} or {m} plus 100? Explain each step.
{q} reads {n} pages a day. How long does a book of {m} hundred pages take? Show steps.
Help {p} to work out {n} + {m} - 7 step by step, the answer alone on the last line.
{q} shares {m} {o} fairly among {n} friends. How many does each get? What is left?
""".strip().splitlines()
_AUDIENCES = """
a child; a student; my grandmother; an engineer; a beginner; a busy manager; a tourist;
somebody who has never heard of it; a class of teenagers; a sceptic; a new colleague
""".replace("\n", " ").split(";")
_MANNERS = """
; in one paragraph; in three sentences; with an example; as a list; in simple words; as
if you told a story; with a little humour; briefly; in detail; and say what is uncertain
""".replace("\n", " ").split(";")
_PEOPLE = """
Anna; Omar; Mei; Lucas; Priya; Tom; Fatima; Jonas; Elena; Kofi; Sara; Hiro; Nadia; Ben
""".replace("\n", " ").split(";")
_THINGS = """
apples; pencils; books; marbles; tickets; cookies; stamps; shells; coins; flowers; cards
""".replace("\n", " ").split(";")


class ChatPrompts(generated.GeneratedTask):
    """Requests for a chat model, each one different until they are used up.

    Args:
      seed: of the order.
      size, eval_size: examples of the splits.
    """

    def __init__(self, *, seed: int = 0, size: int = 1000, eval_size: int = 64):
        super().__init__("chat", size, eval_size)
        topics = [topic.strip() for topic in _TOPICS]
        parts = {"eval": topics[:_HELD_OUT_TOPICS], "train": topics[_HELD_OUT_TOPICS:]}
        self._requests = {}
        for split, chosen in parts.items():
            pairs = list(itertools.product(_TEMPLATES, chosen))
            random.Random(f"{seed}/{split}").shuffle(pairs)
            self._requests[split] = [
                template.format(topic) for template, topic in pairs
            ]

    def _example(self, split: generated.Split, index: int) -> types.Example:
        requests = self._requests[split]
        prompt = ({"role": "user", "content": requests[index % len(requests)]},)
        return types.Example(f"{self.name}/{split}/{index}", prompt, None)


class EverydayPrompts(generated.GeneratedTask):
    """Many more requests, short and long ones, with problems to be worked in steps.

    Held-out ones have the topics, or for problems the people, of no training request.

    Args:
      seed: of what is drawn.
      size, eval_size: examples of the splits.
    """

    def __init__(self, *, seed: int = 0, size: int = 1000, eval_size: int = 64):
        super().__init__("everyday", size, eval_size)
        self._seed = seed

    def _example(self, split: generated.Split, index: int) -> types.Example:
        rng = random.Random(f"{self._seed}/{split}/{index}")

        def parts(words: list[str], num_held_out: int) -> list[str]:
            words = [word.strip() for word in words]
            held_out = split == "eval"
            return words[:num_held_out] if held_out else words[num_held_out:]

        topic, other = rng.sample(parts(_TOPICS, _HELD_OUT_TOPICS), 2)
        one, another = rng.sample(parts(_PEOPLE, 4), 2)
        manner = rng.choice(_MANNERS).strip()
        text = rng.choice(_FORMS).format(
            t=topic,
            u=other,
            p=one,
            q=another,
            a=rng.choice(_AUDIENCES).strip(),
            h=f" {manner}" if manner else "",
            n=rng.randint(3, 12),
            m=rng.randint(13, 40),
            o=rng.choice(_THINGS).strip(),
        )
        prompt = ({"role": "user", "content": text},)
        return types.Example(f"{self.name}/{split}/{index}", prompt, None)
