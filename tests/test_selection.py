"""Which tests ``--loss`` and ``--fast`` choose."""

from pathlib import Path
from types import SimpleNamespace

from tests import conftest
from tests.conftest import composed_subjects, loss_subjects


class Item:
    """What pytest collects, as far as it is looked at."""

    path = Path("tests/test_some.py")

    def __init__(self, name, slow=False, **parameters):
        self.originalname, self.slow, self.parameters = name, slow, parameters
        self.nodeid = f"{name}{parameters}"
        if parameters:
            self.callspec = SimpleNamespace(params=parameters)

    def get_closest_marker(self, name):
        return self if name == "slow" and self.slow else None


class Config:
    """The options, and what was told to be left out."""

    def __init__(self, **options):
        self.options = {"--loss": [], "--fast": False, **options}
        self.left_out = []
        self.hook = SimpleNamespace(pytest_deselected=lambda items: self.left_out.extend(items))

    def getoption(self, name):
        return self.options[name]


def chosen(items, **options):
    config, kept = Config(**options), list(items)
    conftest.pytest_collection_modifyitems(config, kept)
    assert {id(one) for one in (*kept, *config.left_out)} == {id(one) for one in items}
    assert len(kept) + len(config.left_out) == len(items)
    return kept


def test_fast_takes_the_last_case_of_each_loss_and_no_slow_test():
    subjects = [subject for subject in loss_subjects() if subject.loss.name in ("soft_target", "mk_mmd")]
    last = {subject.loss.name: subject for subject in subjects}
    assert len(subjects) > 4 and len(last) == 2
    dtypes = ("float32", "float64")
    cases = [Item("a", loss_subject=subject, dtype=dtype) for subject in subjects for dtype in dtypes]
    others = [
        Item("b"), Item("b", way="x"), *(Item("c", subject=subject) for subject in composed_subjects()),
        *(Item("d", loss_class=type(subject.loss)) for subject in last.values()),
    ]  # fmt: skip
    made = [Item("e", way=SimpleNamespace(loss=subject.loss, by=by)) for subject in subjects for by in "xy"]
    slow = [Item("a", slow=True, loss_subject=subjects[-1]), Item("f", slow=True)]
    kept = chosen([*cases, *others, *made, *slow], **{"--fast": True})
    assert [one.parameters for one in kept if one.originalname == "a"] == [
        {"loss_subject": subject, "dtype": dtype} for subject in last.values() for dtype in dtypes
    ]
    assert [one for one in kept if one in others] == others
    assert [one.parameters["way"].loss.name for one in kept if one.originalname == "e"] == list(last)
    assert not any(one in kept for one in slow)


def test_both_together_and_neither():
    items = [Item("a", loss_subject=subject) for subject in loss_subjects()] + [Item("b")]
    assert chosen(items) == items
    named = chosen(items, **{"--loss": ["soft_target"]})
    assert {one.parameters["loss_subject"].loss.name for one in named} == {"soft_target"} and len(named) > 1
    assert chosen(items, **{"--loss": ["soft_target"], "--fast": True}) == named[-1:]
