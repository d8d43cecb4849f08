"""The built-in task: a small world of film reviews, written by a grammar, with a reward that is known exactly.

A prompt opens a review and a response finishes it. As in the controlled-sentiment experiment of the DPO paper (Rafailov
et al. 2023, section 6) the true reward is a function of the text, so nobody has to guess how good a policy is:

    true_reward(y) = 5 tanh(S / 8),   S = Σ strength · degree · (-1/2)^negators · weight  over the judgements that pay

- The text, in lower case, is cut into sentences at . ! ? and line ends; each is read left to right, without articles.
- A judgement is an opinion word about an aspect: the aspect that the very next word names, else the last one named in
  the sentence so far; without either the word says nothing. A verdict phrase ("skip it") judges the aspect "verdict".
- strength is in OPINIONS and VERDICTS: ±1/2 mild, ±1 plain, ±3/2 strong. degree is that of the last degree word before
  it in its clause and after the previous opinion (DEGREES: 5/4 or 3/4), else 1. negators counts the NEGATORS, and words
  in n't, before it in its clause. A clause ends at "and", at a word of contrast, and at , ; : dashes and brackets.
- weight is 1/2 for what is conceded: all that stands before "but" in its sentence, and what follows "although" up to
  the next , ; : dash or bracket. Else it is 1. TURNS and CONCESSIONS list the words that work like these two.
- Each aspect pays once for praise and once for blame, and so does each opinion word: the first time.

So "The acting is superb, but the plot is not very clever." has S = 3/2 · 1/2 - 1/2 · 5/4 = 1/8, and a copy of a
sentence further on changes nothing.
"""

import math
import random
import re
from typing import NamedTuple

# aspect: its names; praise and blame, each mild, plain, plain, strong; a verb of praise and one of blame
ASPECTS = {
    "acting": ("acting cast performances", "decent lively warm superb", "uneven stiff wooden awful", "shines fails"),
    "plot": ("plot story", "solid clever moving gripping", "thin dull silly hopeless", "surprises drags"),
    "dialogue": ("dialogue script", "decent sharp witty brilliant", "wordy clumsy stale dreadful", "sparkles creaks"),
    "music": ("score music", "pleasant lovely lush haunting", "loud bland shrill grating", "soars grates"),
    "camera": ("camera photography", "neat elegant graceful stunning", "plain murky ugly hideous", "dazzles distracts"),
    "pacing": ("pacing", "steady brisk tight perfect", "slow sluggish jerky painful", "works sags"),
    "ending": ("ending finale", "neat satisfying touching powerful", "rushed weak lazy terrible", "delivers fizzles"),
    "direction": ("direction", "careful confident subtle masterful", "timid careless muddled inept", "dazzles falters"),
    "characters": ("characters", "likeable charming vivid unforgettable", "flat shallow annoying unbearable",
                   "convinces irritates"),
    "film": ("film", "pleasant bold delightful wonderful", "patchy boring dreary unwatchable", "delights drags"),
}  # fmt: skip
PLURAL = {"performances", "characters"}
VERDICTS = {
    "give it a try": 0.5, "buy a ticket": 1.0, "go and see it": 1.0, "do not miss it": 1.5, "see it twice": 1.5,
    "wait for a rainy day": -0.5, "skip it": -1.0, "save your money": -1.0, "stay at home": -1.0, "avoid it": -1.5,
}  # fmt: skip
# Words that suit any aspect; the grammar uses only the verbs, in "I loved the music".
ANYTHING = {
    "fine": 0.5, "good": 1.0, "great": 1.5, "excellent": 1.5, "liked": 0.5, "enjoyed": 1.0, "loved": 1.5,
    "mediocre": -0.5, "poor": -1.0, "bad": -1.0, "horrible": -1.5, "disliked": -1.0, "hated": -1.5,
}  # fmt: skip
DEGREES = {"very": 1.25, "truly": 1.25, "really": 1.25, "rather": 0.75, "quite": 0.75, "little": 0.75, "slightly": 0.75}
NEGATORS = {"not", "never", "no", "hardly", "without", "nothing", "nobody", "neither", "nor", "cannot", "far from"}
ARTICLES = {"a", "an", "the", "this", "its"}
TURNS = {"but", "yet", "however"}
CONCESSIONS = {"although", "though", "despite"}
PAUSES = {",", ";", ":", "—", "–", "(", ")"}
LEADS = {1: ["happily, ", "best of all, "], -1: ["sadly, ", "worst of all, "]}

GENRES = "western thriller comedy drama romance mystery musical fantasy".split()
MOODS = "new quiet modern short dark strange".split()
TITLE_ADJECTIVES = "Paper Silver Broken Hidden Golden Silent Burning Lost Frozen Crooked Second Last".split()
TITLE_NOUNS = "Lighthouse Garden River Mirror Letter Piano Orchard Winter Compass Stranger Window Crown".split()
DIRECTORS = [f"{a} {b}" for a in "Ana Jonas Ruth Carl Ines".split() for b in "Reyes Holm Ito Costa Novak".split()]
PERFORMERS = [f"{a} {b}" for a in "Nora Otto Lena Hugo Mina".split() for b in "Vale Stern Okoye Lind Moran".split()]
SURNAMES = {name.split()[1] for name in PERFORMERS}
CHARACTERS = "captain widow thief teacher sailor detective nurse".split()
PLACES = "harbour station castle market chapel hotel bridge".split()
NUMBERS = "five ten twenty forty".split()


def _opinions() -> dict[str, float]:
    opinions = dict(ANYTHING)
    for names, praise, blame, verbs in ASPECTS.values():
        for words, sign in ((praise, 1), (blame, -1)):
            opinions |= zip(words.split(), (sign * strength for strength in (0.5, 1.0, 1.0, 1.5)), strict=True)
        for verb, sign in zip(verbs.split(), (1.0, -1.0), strict=True):
            opinions[verb] = sign
            if PLURAL & set(names.split()):
                opinions[verb.removesuffix("s")] = sign
    return opinions


OPINIONS = _opinions()
ASPECT_OF = {name: aspect for aspect, (names, *_) in ASPECTS.items() for name in names.split()}
ASPECT_OF |= dict.fromkeys(["movie", "it", *GENRES], "film")
ASPECT_OF |= dict.fromkeys((name.lower() for name in SURNAMES), "acting")

_SENTENCE = re.compile(r"[^.!?\r\n]+")
_WORD = re.compile(rf"\b(?:{'|'.join([*VERDICTS, 'far from'])})\b|[a-z]+(?:'[a-z]+)?|[{''.join(PAUSES)}]")
_DETAIL = re.compile(
    rf"\b(?:{'|'.join([*sorted(SURNAMES), *CHARACTERS, *PLACES])}|(?:{'|'.join(NUMBERS)}|\d+) minutes|minute \d+)\b",
    re.I,
)


def sentences(response: str) -> list[str]:
    """A text in lower case, cut where `judgements` expects it; some may be blank."""
    return _SENTENCE.findall(response.lower().replace("’", "'"))


def judgements(sentence: str) -> list[tuple[str, str, float]]:
    """What one lower-case sentence says, as (aspect, opinion word, value) in reading order, repetitions included."""
    return [(about, word, value) for about, word, value, _ in _located(sentence)]


def _located(sentence: str) -> list[tuple[str, str, float, int]]:
    """The judgements of a sentence, each with the place where its opinion word begins."""
    found: list[tuple[str, str, float, float, int]] = []
    aspect, negation, degree, weight = None, 1.0, 1.0, 1.0
    words = [(match[0], match.start()) for match in _WORD.finditer(sentence) if match[0] not in ARTICLES]
    for (word, start), (following, _) in zip(words, [*words, ("", 0)][1:], strict=True):
        if word in ASPECT_OF:
            aspect = ASPECT_OF[word]
        elif word in OPINIONS:
            if about := ASPECT_OF.get(following, aspect):
                found.append((about, word, OPINIONS[word] * degree * negation, weight, start))
            degree = 1.0
        elif word in VERDICTS:
            found.append(("verdict", word, VERDICTS[word] * degree * negation, weight, start))
            degree = 1.0
        elif word in DEGREES:
            degree = DEGREES[word]
        elif word in NEGATORS or word.endswith("n't"):
            negation *= -0.5
        elif word in TURNS:
            found = [(about, term, value, 0.5, place) for about, term, value, _, place in found]
            negation, degree, weight = 1.0, 1.0, 1.0
        elif word in CONCESSIONS:
            negation, degree, weight = 1.0, 1.0, 0.5
        elif word == "and":
            negation, degree = 1.0, 1.0
        elif word in PAUSES:
            negation, degree, weight = 1.0, 1.0, 1.0
    return [(about, word, value * conceded, start) for about, word, value, conceded, start in found]


class Opinion(NamedTuple):
    """A judgement of a response: where its opinion word stands there, response[start:end], what it is worth by itself,
    and what S is paid for it, which is that or 0."""

    start: int
    end: int
    value: float
    paid: float


def opinions(response: str) -> list[Opinion]:
    """The judgements of any text in reading order, those that do not pay included. The sum of `paid` is S."""
    lower, found, seen = response.lower().replace("’", "'"), [], set()
    # where each character of the lower-case text stands in the response: "İ" alone becomes two
    place = range(len(lower)) if len(lower) == len(response) else [i for i, c in enumerate(response) for _ in c.lower()]
    for sentence in _SENTENCE.finditer(lower):
        for aspect, word, value, start in _located(sentence[0]):
            said = {(aspect, value > 0), (word, value > 0)}
            start += sentence.start()
            pays = seen.isdisjoint(said)
            found.append(Opinion(place[start], place[start + len(word) - 1] + 1, value, value if pays else 0.0))
            seen |= said if pays else set()
    return found


def true_reward(response: str) -> float:
    """The reward of any text, in [-5, 5]; 0 if it judges nothing. The formula is at the top of this file."""
    return 5 * math.tanh(sum(opinion.paid for opinion in opinions(response)) / 8)


def specificity(response: str) -> float:
    """The second attribute: the share of sentences, in [0, 1], with a concrete detail that was not mentioned before.

    A detail is a performer, a character, a place of this world, or a time in minutes. Text without a sentence has 0.
    """
    sentences = [s for s in _SENTENCE.findall(response) if s.strip()]
    seen, concrete = set(), 0
    for sentence in sentences:
        details = {detail.lower() for detail in _DETAIL.findall(sentence)}
        concrete += not details <= seen
        seen |= details
    return concrete / max(len(sentences), 1)


class Film(NamedTuple):
    """What a review speaks of: taken from its prompt where that says it."""

    genre: str
    director: str
    performer: str
    character: str


def _film(rng: random.Random, prompt: str) -> Film:
    choices = (GENRES, DIRECTORS, PERFORMERS, CHARACTERS)
    return Film(*(next((name for name in names if name in prompt), None) or rng.choice(names) for names in choices))


def sample_prompt(rng: random.Random) -> str:
    """The opening of a review, 10 to 18 words: which film it is."""
    title = rng.choice(["The ", ""]) + f"{rng.choice(TITLE_ADJECTIVES)} {rng.choice(TITLE_NOUNS)}"
    mood, genre, director, performer = map(rng.choice, (MOODS, GENRES, DIRECTORS, PERFORMERS))
    when = rng.choice(["Last night", "Last weekend", "On Friday", "On Sunday"])
    return rng.choice(
        [
            f"{when} I watched {title}, a {mood} {genre} by {director}.",
            f"{when} we went to see {title}, the {mood} {genre} by {director}.",
            f"{title} is a {mood} {genre} by {director}, with {performer} in the main role.",
            f"{director} is back with {title}, a {mood} {genre} about a {rng.choice(CHARACTERS)}.",
            f"My friends told me to watch {title}, a {mood} {genre} with {performer}.",
            f"{title}, the {mood} {genre} by {director}, is now in cinemas.",
        ]
    )


def clause(rng: random.Random, film: Film, aspect: str, sign: int) -> str:
    """A clause, without capital or full stop, that praises (sign 1) or blames (sign -1) one aspect."""
    names, praise, blame, verbs = (part.split() for part in ASPECTS[aspect])
    ours, theirs = (praise, blame) if sign > 0 else (blame, praise)
    name = rng.choice(names)
    is_, feels, s = ("are", "feel", "") if name in PLURAL else ("is", "feels", "s")
    subject, tail = f"the {name}" + " work" * (name == "camera"), ""
    if aspect == "acting" and name not in PLURAL and rng.random() < 0.5:
        subject, tail = film.performer, f" as the {film.character}"
    elif aspect == "direction" and rng.random() < 0.5:
        subject = f"{film.director.split()[1]}'s direction"
    elif aspect == "film" and rng.random() < 0.5:
        subject = f"this {film.genre}"
    elif aspect == "ending" and rng.random() < 0.4:
        subject += f" at the {rng.choice(PLACES)}"
    form = rng.random()
    if form < 0.2:
        return f"{subject} {verbs[sign < 0].removesuffix('s')}{s}{tail}"
    if form < 0.4:
        never = "far from" if aspect == "ending" else "never"  # an ending is over too soon to be never anything
        negator = rng.choice([never, "far from"] if sign > 0 else ["not exactly", "hardly", "far from"])
        return f"{subject} {is_} {negator} {rng.choice(theirs[1:3])}{tail}"
    if form < 0.55:
        degree = rng.choice(["very", "rather" if sign > 0 else "a little"])
        return f"{subject} {is_} {degree} {rng.choice(ours[1:3])}{tail}"
    if form < 0.65:
        return f"{subject} {is_} truly {ours[3]}{tail}"
    return f"{subject} {feels if form > 0.9 else is_} {rng.choice(ours)}{tail}"


def _judge_one(rng: random.Random, film: Film, aspect: str, sign: int) -> str:
    names, praise, blame, _ = ASPECTS[aspect]
    name = "the " + names.split()[0] + " work" * (aspect == "camera")
    opinion = rng.choice((praise if sign > 0 else blame).split()[1:])
    form = rng.random()
    if form < 0.1:
        return f"I {rng.choice(['loved', 'enjoyed'] if sign > 0 else ['hated', 'disliked'])} {name}"
    if form < 0.2:
        return f"I still remember {name.replace(' ', f' {opinion} ', 1)}"
    if form < 0.3:
        return f"I found {'it' if aspect == 'film' else name} {opinion}"
    if form < 0.6 and aspect not in ("ending", "film"):
        return f"{clause(rng, film, aspect, sign)}, above all in the {rng.choice(PLACES)} scene"
    return clause(rng, film, aspect, sign)


def _judge_two(rng: random.Random, film: Film, aspects: list[str], signs: list[int]) -> str:
    one, two = (clause(rng, film, aspect, sign) for aspect, sign in zip(aspects, signs, strict=True))
    if signs[0] == signs[1]:
        return f"{one} and {two}"
    return rng.choice([f"{one}, but {two}", f"although {one}, {two}", f"{one}, though {two}"])


def _aside(rng: random.Random, film: Film) -> str:
    """A sentence without an opinion; most are specific."""
    place = rng.choice(PLACES)
    return rng.choice(
        [
            f"the scene at the {place} lasts {rng.choice(NUMBERS)} minutes",
            f"{film.performer} plays the {film.character}",
            f"after {rng.choice(NUMBERS)} minutes the {film.character} leaves the {place}",
            f"in the first scene the {film.character} waits at the {place}",
            "I saw it with my friends",
            "we talked about it on the way home",
        ]
    )


def sample_response(rng: random.Random, prompt: str) -> str:
    """The rest of the review: a space and 2 to 5 sentences, from a latent stance between scathing and glowing."""
    film, stance = _film(rng, prompt), rng.uniform(-0.35, 0.35)
    aspects = rng.sample(list(ASPECTS), rng.choice([3, 3, 4]))
    signs = [1 if rng.random() < 0.5 + stance else -1 for _ in aspects]
    sentences, told = [], 0
    while told < len(aspects):
        if told + 1 < len(aspects) and rng.random() < 0.6:
            sentences.append(_judge_two(rng, film, aspects[told : told + 2], signs[told : told + 2]))
            told += 2
        else:
            lead = rng.choice(LEADS[signs[told]]) if told and rng.random() < 0.25 else ""
            sentences.append(lead + _judge_one(rng, film, aspects[told], signs[told]))
            told += 1
    if len(sentences) < 4 and "," not in sentences[-1] and rng.random() < 0.15:
        sentences.append(f"I say it again: {sentences[-1]}")
    if len(sentences) < 4 and rng.random() < 0.6:
        sentences.insert(rng.randrange(len(sentences) + 1), _aside(rng, film))
    if rng.random() < 0.45:
        verdicts = [phrase for phrase, value in VERDICTS.items() if value * (sum(signs) or stance) > 0]
        sentences.append(rng.choice(["", "in short, ", "my advice: "]) + rng.choice(verdicts))
    return "".join(f" {sentence[0].upper()}{sentence[1:]}." for sentence in sentences)
