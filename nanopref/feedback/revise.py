"""Self-critique, the first half of constitutional AI (Bai et al. 2022, section 3): answer, critique, revision.

A chat model is asked to criticise its answer by a principle and to write it anew: `revise_in_words`. The small ones of
the built-in task cannot be asked, so the rules themselves find the fault, and a revision is another try: `revise`.
"""

import random
from collections.abc import Sequence

from nanopref.data.dialogues import Dialogue, as_prompt
from nanopref.data.tokenizer import Tokenizer
from nanopref.feedback.rules import Rule, broken
from nanopref.models.language import LM
from nanopref.models.sampling import respond


def revise(
    policy: LM, tokenizer: Tokenizer, prompts: Sequence[str], rules: Sequence[Rule], *, tries: int = 8, **sampling
) -> list[dict[str, str]]:
    """An answer to each prompt and, where it breaks a rule, a revision: a row each, for SFT on the completions.

    The critique is the heaviest rule that the draft breaks; a new answer that keeps it, and breaks none that the draft
    kept, is its revision. What is not repaired in so many tries, or has no end, is left out. `sampling` is as for
    `respond`.
    """
    drafts = respond(policy, tokenizer, prompts, stream="drafts", **sampling)
    rows, left = [], []
    for prompt, draft in zip(prompts, drafts, strict=True):
        faults = broken(rules, draft.text)
        if faults:
            left.append((prompt, draft.text, faults))
        elif draft.ended:
            rows.append({"prompt": prompt, "completion": draft.text})
    for attempt in range(tries):
        asked = [prompt for prompt, _, _ in left]
        found = respond(policy, tokenizer, asked, stream=f"revisions {attempt}", **sampling) if asked else []
        still = []
        for (prompt, draft, faults), answer in zip(left, found, strict=True):
            again = broken(rules, answer.text)
            if answer.ended and all(rule in faults[1:] for rule in again):
                row = {"prompt": prompt, "completion": answer.text, "critique": faults[0].name, "draft": draft}
                rows.append(row)
            else:
                still.append((prompt, draft, faults))
        left = still
    return rows


CRITIQUE = """Judge your last answer by this principle: {principle}
Say in one or two sentences what is wrong with it."""
REVISION = "Now write that answer anew, so that it follows the principle. Write the answer alone."


def revise_in_words(
    model: LM, tokenizer: Tokenizer, prompts: Sequence[str], rules: Sequence[Rule], *, seed: int, **sampling
) -> list[dict[str, str]]:
    """The same of a chat model that is asked, in one conversation, for an answer, what is wrong with it by a rule's
    principle, and for a better one: a row each, for SFT on the completions.

    The rule is drawn for each prompt, by the rules' weights. A revision that is empty or has no end is left out.
    `sampling` is as for `respond`.
    """
    drawn = random.Random(f"principles {seed}").choices(rules, [rule.weight for rule in rules], k=len(prompts))
    asked = [x if isinstance(x, Dialogue) else as_prompt(x) for x in prompts]  # a transcript is read as one
    asked = [x if isinstance(x, Dialogue) else Dialogue([("user", x)]) for x in asked]
    talks, said = asked, {}
    for name, words in (("draft", CRITIQUE), ("critique", REVISION), ("completion", "")):
        said[name] = respond(model, tokenizer, talks, stream=name, seed=seed, **sampling)
        talks = [
            Dialogue([*talk.messages, ("assistant", answer.text.strip()), ("user", words.format(**rule._asdict()))])
            for talk, answer, rule in zip(talks, said[name], drawn, strict=True)
        ]
    rows = []
    for i, (prompt, rule, revision) in enumerate(zip(asked, drawn, said["completion"], strict=True)):
        if revision.ended and revision.text.strip():
            texts = {name: answers[i].text.strip() for name, answers in said.items()}
            rows.append({"prompt": prompt, "principle": rule.principle, **texts})
    return rows
