"""Short stories: a hero, a friend, a plot told beat by beat, with a cause and its consequence."""

from __future__ import annotations

from nanochat.corpus.grammar import article, grammar
from nanochat.corpus.rng import Rng

PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
WOMEN = ("grandmother", "mother", "aunt")
MEN = ("grandfather", "father", "uncle")


def cast(rng: Rng, *, animal: str | None = None, name: str | None = None) -> dict[str, str]:
    """The slots of a hero, a friend and a helper. `animal` or `name` fixes the hero."""
    g = grammar("stories.txt")
    gender = rng.pick(("girl", "boy"))
    if name is not None:
        gender = "girl" if name in g.lists["girl"] else "boy"
    kid = name or rng.pick(g.lists[gender])
    size = rng.pick(("little", "young", "small"))
    if animal or (name is None and rng.chance(30)):
        animal = animal or rng.pick(g.lists["animal"])
        hero, who = f"the {size} {animal}", article(f"{size} {animal}")
        if rng.chance(40):
            hero, who = kid, f"{who} named {kid}"
    else:
        hero, who = kid, rng.pick(("a {g} named {n}", "a {g} called {n}", "a {s} {g} named {n}"))
        who = who.format(g=gender, n=kid, s=size)
    friend = hero
    while friend in hero:
        friend = rng.pick(g.lists[rng.pick(("girl", "boy"))])
    if rng.chance(20):
        friend = "the " + rng.pick([a for a in g.lists["animal"] if a not in hero and a not in who])
    he, him, his = PRONOUNS[gender]
    helper = rng.pick((*WOMEN, *MEN))
    he2 = "she" if helper in WOMEN else "he"
    slots = {"hero": hero, "who": who, "friend": friend, "helper": helper}
    return slots | {"he": he, "him": him, "his": his, "he2": he2}


def story(rng: Rng, *, animal: str | None = None, name: str | None = None) -> str:
    """One story of about a hundred words."""
    g = grammar("stories.txt")
    return g.tell(rng.pick(list(g.plots)), rng, cast(rng, animal=animal, name=name))
