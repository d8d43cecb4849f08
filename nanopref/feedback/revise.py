"""Self-critique, the first half of constitutional AI (Bai et al. 2022, section 3): answer, critique, revision.

A model that follows instructions is asked to criticise its answer by a principle and to write it anew. The small ones
here cannot be asked, so the rules themselves find the fault, and a revision is another try.
"""

from collections.abc import Sequence

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
