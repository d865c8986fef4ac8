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
