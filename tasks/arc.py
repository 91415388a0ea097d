"""ARC: multiple-choice science questions from school exams (arXiv 1803.05457)."""

from nanochat.errors import UserError
from tasks.common import Conversation, HubTask, choice_conversation, field

_CONFIGS = {"easy": "ARC-Easy", "challenge": "ARC-Challenge"}


class ARC(HubTask):
    """`allenai/ai2_arc`, subset easy or challenge; splits train, val and test."""

    eval_type = "categorical"

    def __init__(self, split: str, subset: str = "easy"):
        if subset not in _CONFIGS:
            raise UserError(f"arc has no subset '{subset}', only {' and '.join(_CONFIGS)}")
        hub_split = "validation" if split == "val" else split
        super().__init__(f"arc-{subset}", split, "allenai/ai2_arc", _CONFIGS[subset], hub_split)

    def row(self, index: int) -> Conversation:
        where = self.where(index)
        row = self.rows[index]
        choices = field(row, "choices", dict, where)
        texts, labels = field(choices, "text", list, where), field(choices, "label", list, where)
        key = field(row, "answerKey", str, where)
        if len(texts) != len(labels):
            raise UserError(f"{where}: {len(texts)} options but {len(labels)} labels")
        if key not in labels:
            raise UserError(f"{where}: the answer '{key}' is none of the labels {labels}")
        # Some exams use the labels 1 to 4, so all options get letters by their position.
        question = field(row, "question", str, where)
        return choice_conversation(question, texts, labels.index(key), where)


if __name__ == "__main__":
    from tasks.specs import main

    main("subset", arc=ARC)
