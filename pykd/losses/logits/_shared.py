"""The kernel that soft_target and hard_target share."""

from pykd.fused.description import Argument, Kernel

# One pass over a row of logits serves the soft term, the hard term, or both.
KERNEL = Kernel(
    "soft_target",
    inputs={
        "student": Argument("batch classes"),
        "teacher": Argument("batch classes"),
        "temperature": Argument("", "number"),
        "soft_weight": Argument("batch", "float32"),
        "labels": Argument("batch", "index"),
        "label_probs": Argument("batch classes"),
        "hard_weight": Argument("batch", "float32"),
    },
    outputs={
        "soft": Argument("batch", "float32"),
        "hard": Argument("batch", "float32"),
        "grad_student": Argument("batch classes"),
    },
    attributes={"form": "cross_entropy", "soften_student": True, "beta": 0.5},
)
