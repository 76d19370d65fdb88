# SPDX-License-Identifier: Apache-2.0
"""The class labels of a prior's configuration: their number, their names and changes of both."""

from textwrap import shorten
from typing import Any, ClassVar

from ..ranges import NonNegativeInt, checked


class LabelSetMixin:
    """
    Labels of a configuration, placed before `PreTrainedConfig` among its bases: `num_labels` may be 0, and `id2label`,
    which names the ids from 0 on, decides where both are given.
    """

    _default_num_labels: ClassVar[int] = 0
    id2label: Any
    label2id: Any

    def __post_init__(self, num_labels: int | None = None, **kwargs):
        num_labels = checked("num_labels", num_labels, NonNegativeInt | None)
        if self.id2label is None:
            kwargs["num_labels"] = self._default_num_labels if num_labels is None else num_labels
        else:
            self._check_label_names(self.id2label, num_labels)
        super().__post_init__(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        names = self.id2label or {}
        if self.label2id is None or set(self.label2id) != set(names.values()):
            self.label2id = {name: int(label) for label, name in names.items()}

    @staticmethod
    def _check_label_names(id2label: Any, num_labels: int | None) -> None:
        checked("id2label", id2label, dict)
        if num_labels is not None and num_labels != len(id2label):
            raise ValueError(
                f"`num_labels` is {num_labels} but `id2label` names {len(id2label)} labels. Pass an `id2label` of "
                "the new length (`id2label={0: ...}`), which sets the number of labels."
            )
        # JSON turns the ids into text.
        ids = [int(label) if str(label).isdecimal() else label for label in id2label]
        if set(ids) != set(range(len(ids))):
            raise ValueError(f"`id2label` must name the ids 0 to {len(ids) - 1}, got {shorten(repr(ids), 80)}.")
        unnamed = {label: name for label, name in id2label.items() if not isinstance(name, str)}
        if unnamed:
            raise ValueError(f"`id2label` must name each label by a text, got {shorten(repr(unnamed), 80)}.")

    def set_labels(self, id2label: dict[int, str] | None) -> None:
        """Change the names of the labels and with them their number, see [`VARTransformer.set_labels`]."""
        id2label = {} if id2label is None else id2label
        self._check_label_names(id2label, None)
        names = {int(label): name for label, name in id2label.items()}
        self.id2label = dict(sorted(names.items()))
        self.label2id = {name: label for label, name in self.id2label.items()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        if "id2label" in kwargs:
            kwargs.setdefault("label2id", None)
        return super().from_dict(config_dict, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def to_diff_dict(self) -> dict[str, Any]:
        # transformers leaves out what equals its own default, and there two unnamed labels are the default.
        known = super().to_diff_dict()  # pyright: ignore[reportAttributeAccessIssue]
        return {**known, "id2label": self.id2label, "label2id": self.label2id}
