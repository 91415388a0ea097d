"""MMLU: multiple choice over 57 school and university subjects (arXiv 2009.03300)."""

from tasks.common import Conversation, HubTask, choice_conversation, field

# The data set has no train split of its own: `auxiliary_train` gathers questions of other sets.
_SPLITS = {
    "train": ("auxiliary_train", "train"),
    "val": ("all", "validation"),
    "dev": ("all", "dev"),
    "test": ("all", "test"),
}


class MMLU(HubTask):
    """`cais/mmlu`; splits train (the auxiliary 100k), val, dev and test (14k)."""

    eval_type = "categorical"
    SHOTS_FROM = "dev"

    def __init__(self, split: str):
        config, hub_split = _SPLITS.get(split, ("all", split))
        super().__init__("mmlu", split, "cais/mmlu", config, hub_split)

    def row(self, index: int) -> Conversation:
        where = self.where(index)
        row = self.rows[index]
        if isinstance(row.get("train"), dict):  # auxiliary_train nests each row under this key
            row = row["train"]
        conversation = choice_conversation(
            field(row, "question", str, where),
            field(row, "choices", list, where),
            field(row, "answer", int, where),
            where,
        )
        # The questions of auxiliary_train have no subject.
        return {**conversation, "subject": row.get("subject") or ""}


if __name__ == "__main__":
    from tasks.specs import main

    main(None, mmlu=MMLU)
