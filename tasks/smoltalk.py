"""SmolTalk: general conversations, in the selection made for small models (arXiv 2502.02737)."""

from tasks.common import Conversation, HubTask, field


class SmolTalk(HubTask):
    """`HuggingFaceTB/smol-smoltalk`; splits train (460k rows) and test (24k). Not judged."""

    def __init__(self, split: str):
        super().__init__("smoltalk", split, "HuggingFaceTB/smol-smoltalk", None, split)

    def row(self, index: int) -> Conversation:
        return {"messages": field(self.rows[index], "messages", list, self.where(index))}


if __name__ == "__main__":
    from tasks.specs import main

    main(None, smoltalk=SmolTalk)
