"""Views of tasks: a part of a task, the rest of it, several tasks mixed."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from nanochat.data.order import MixtureOrder
from nanochat.errors import UserError
from tasks.common import Conversation, Task

HELD_OUT_ROWS, HELD_OUT_ONE_IN = 64, 50


class _View(Task):
    """Rows of other tasks, which judge the answers to them."""

    @abstractmethod
    def judge_of(self, conversation: Conversation) -> tuple[Task, Conversation]:
        """Return the task that a row is from, and the row in that task."""

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        task, conversation = self.judge_of(conversation)
        return task.evaluate(conversation, completion)

    def reward(self, conversation: Conversation, completion: str) -> float:
        task, conversation = self.judge_of(conversation)
        return task.reward(conversation, completion)

    def well_formed(self, conversation: Conversation, completion: str) -> bool:
        task, conversation = self.judge_of(conversation)
        return task.well_formed(conversation, completion)


class _Part(_View):
    """Some rows of a task."""

    def __init__(self, task: Task):
        super().__init__(task.name, task.split)
        self.eval_type = task.eval_type
        self.task = task

    @abstractmethod
    def locate(self, index: int) -> int:
        """Number of the row in the task."""

    def row(self, index: int) -> Conversation:
        return self.task[self.locate(index)]

    def where(self, index: int) -> str:
        return self.task.where(self.locate(index))

    def judge_of(self, conversation: Conversation) -> tuple[Task, Conversation]:
        return self.task, conversation


class TaskSlice(_Part):
    """Rows start, start + step, ... of a task, for a quick look or to hold out a part of train.

    >>> # every twentieth row for validation during reinforcement learning
    >>> # TaskSlice(task, 0, None, 20)
    """

    def __init__(self, task: Task, start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(task)
        self.indices = range(len(task))[start:stop:step]
        if not self.indices:
            raise UserError(
                f"rows {start}:{stop}:{step} of {task.name}/{task.split} are none: "
                f"it has {len(task)}"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> int:
        return self.indices[index]

    def settings(self) -> dict[str, Any]:
        rows = self.indices
        return {"task": self.task.fingerprint(), "rows": [rows.start, rows.stop, rows.step]}


class TaskRest(_Part):
    """The rows of a task that a slice of it leaves out, in order."""

    def __init__(self, part: TaskSlice):
        super().__init__(part.task)
        self.removed = part.indices
        if len(self) == 0:
            raise UserError(f"nothing is left of {part.name}/{part.split}; take fewer rows out")

    def __len__(self) -> int:
        return len(self.task) - len(self.removed)

    def locate(self, index: int) -> int:
        """Number of the row in the task, of which every step-th row is removed."""
        start, step, count = self.removed.start, self.removed.step, len(self.removed)
        if index < start:
            return index
        passed = (index - start) // (step - 1) + 1 if step > 1 else count
        return index + min(passed, count)

    def settings(self) -> dict[str, Any]:
        rows = self.removed
        return {"task": self.task.fingerprint(), "without": [rows.start, rows.stop, rows.step]}


def hold_out(task: Task) -> tuple[Task, Task | None]:
    """Split a task into (rows to train on, held-out rows for evaluation during training).

    Every n-th row is held out, up to 64 rows and at most one row in fifty. A task with fewer than
    fifty rows has no held-out rows.
    """
    count = min(HELD_OUT_ROWS, len(task) // HELD_OUT_ONE_IN)
    if count == 0:
        return task, None
    step = len(task) // count
    part = TaskSlice(task, step - 1, step * count, step)
    return TaskRest(part), part


class TaskMixture(_View):
    """Tasks shuffled into each other; the mixture weight of each is its passes per epoch.

    The task of a row judges its answers.

    The order of epoch e is a keyed permutation that is computed row by row (`MixtureOrder`), so it
    needs no memory even for ten million rows. Epochs differ in order, and with a fraction as weight
    also in rows: over epochs 0..k-1 a task of n rows with weight w gives floor(k*w*n) rows.

    RL takes its prompts in this order. Mid-training and SFT mix the encoded stores of the tasks
    (`nanochat.data.sources.Source`) with the same weights and the same `MixtureOrder`.
    """

    def __init__(self, tasks: Sequence[tuple[Task, float]], seed: int = 0, epoch: int = 0):
        if not tasks:
            raise UserError("a mixture needs at least one task")
        splits = {task.split for task, _ in tasks}
        super().__init__("mixture", "+".join(sorted(splits)))
        self.tasks = [task for task, _ in tasks]
        # One categorical task makes all categorical, since it has no free answers.
        if any(task.eval_type == "categorical" for task in self.tasks):
            self.eval_type = "categorical"
        self.weights = [float(weight) for _, weight in tasks]
        for task, weight in tasks:
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"weight {weight} of {task.name} must be above 0; leave the task out instead"
                )
        self.seed = seed
        self.epoch = epoch
        self.order = MixtureOrder([len(task) for task in self.tasks], self.weights, seed)

    def __len__(self) -> int:
        return self.order.epoch_length(self.epoch)

    def locate(self, index: int) -> tuple[int, int]:
        """Find (number of the task, row in that task)."""
        return self.order.locate(self.epoch, index)

    def row(self, index: int) -> Conversation:
        number, inner = self.locate(index)
        conversation = self.tasks[number][inner]
        return {**conversation, "source": (number, conversation.get("source"))}

    def where(self, index: int) -> str:
        number, inner = self.locate(index)
        return self.tasks[number].where(inner)

    def judge_of(self, conversation: Conversation) -> tuple[Task, Conversation]:
        number, inner = conversation["source"]
        return self.tasks[number], {**conversation, "source": inner}

    def settings(self) -> dict[str, Any]:
        return {
            "tasks": [task.fingerprint() for task in self.tasks],
            "weights": self.weights,
            "seed": self.seed,
            "epoch": self.epoch,
        }
