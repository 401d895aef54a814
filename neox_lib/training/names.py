"""Stories told again with other names: new text for a model that has read the same stories many times.

A model that reads "Lily" on every page learns to write "Lily"; one that reads a story with five sets of names must look
back to see who is in it.
"""

import random
import re
from collections import Counter

# The commonest names of TinyStories (Eldan & Li 2023) and similar text; a girl's name takes the place of a girl's.
GIRLS = """
Amy Ana Anna Annie Bella Betty Daisy Ella Emily Emma Grace Jane Jen Jenny Jessica Jill Kate Katie Lara Lila Lily Lisa
Lizzy Lola Lucy Lulu Maggie Mandy Maria Mary Mia Mila Mimi Molly Nina Penny Polly Rose Rosie Sally Samantha Sara Sarah
Sophie Sue Susie Tina Zoe
"""
BOYS = """
Adam Alex Andy Ben Bill Billy Bob Bobby Charlie Dan Danny David Fred Freddy Harry Henry Jack Jake James Jim Jimmy Joe
Joey John Johnny Josh Ken Leo Mark Max Mike Mikey Nick Peter Rob Roger Ron Sam Tim Timmy Toby Tom Tommy Tony Zach
"""
NAME = re.compile(rf"\b(?:{'|'.join((GIRLS + BOYS).split())})\b")


def with_other_names(stories: list[str], seed: int = 0) -> list[str]:
    """The stories in another order, each name in them replaced by one drawn as often as the stories use it.

    Within a story, one name stays one name and two stay two.
    """
    generator = random.Random(seed)
    counts = Counter(name for story in stories for name in NAME.findall(story))

    def rename(story: str) -> str:
        renamed: dict[str, str] = {}
        for name in dict.fromkeys(NAME.findall(story)):
            same_kind = next(names.split() for names in (GIRLS, BOYS) if name in names.split())
            names = [each for each in same_kind if each not in renamed.values()]
            renamed[name] = generator.choices(names, [counts[each] + 1 for each in names])[0]
        return NAME.sub(lambda match: renamed[match[0]], story)

    return generator.sample([rename(story) for story in stories], len(stories))
