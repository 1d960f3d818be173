"""A loss is found by its name, its class's and its aliases, whatever their case, and no two losses share one."""

import inspect
import pickle
import re
from pathlib import Path

import pytest

import pykd
import pykd.losses
from pykd import command_line, recipe
from pykd.definition import Alias, Loss, Spec, registry
from tests.test_settings import declare

CASES = (str, str.upper, str.lower, str.swapcase, lambda name: name.replace("_", "-"))


def test_every_name_finds_the_loss(loss_class, capsys):
    plain = type(loss_class())
    for name in (loss_class.name, loss_class.__name__, *loss_class.aliases):
        means = name.settings if isinstance(name, Alias) else {}
        for changed in {change(name) for change in CASES}:
            found = pykd.get(changed)
            assert found is loss_class or (means and issubclass(found, loss_class) and found is pykd.get(name))
        made = pykd.get(name)()
        assert type(made) is plain and made.settings() == loss_class(**means).settings()
    for alias in loss_class.aliases:
        (term,) = recipe.build({"loss": alias}).named_terms
        loss = term.parts[0].loss
        means = alias.settings if isinstance(alias, Alias) else {}
        assert type(loss) is plain and loss.settings() == loss_class(**means).settings()
        assert command_line.main(["show", alias]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"{loss_class.__name__}(") and f"Also called: {loss_class.aliases[0]}" in shown
        for name, value in means.items():
            assert re.search(rf"{name}: \w+ = {re.escape(repr(value))}", shown.splitlines()[0])
            assert re.search(rf"{alias} \(.*{name}={re.escape(repr(value))}", shown.splitlines()[-1])


def test_the_family_is_the_folder(loss_class):
    folder = Path(inspect.getfile(loss_class)).parent
    home = Path(pykd.losses.__file__).parent
    assert loss_class.family == (folder.name if home in folder.parents else "")


def good(student_logits, teacher_logits, reduction: str):
    return (student_logits - teacher_logits).abs().mean()


@pytest.mark.parametrize("fields", [{"aliases": ("kd",)}, {"aliases": ("Soft-Target",)}, {"aliases": ("SOFTTARGET",)}])
def test_no_two_losses_share_a_name(fields):
    with pytest.raises(
        ValueError,
        match=r"expected a new name for tests.test_settings.ALoss, got '.*', which "
        r"pykd.losses.logits.soft_target.SoftTarget has; choose another",
    ):
        declare(good, **fields)
    made = declare(good, aliases=("one-that-is-free",))
    assert made.family == "" and pykd.get("kd") is pykd.SoftTarget


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="got 'SoftTarget', which pykd.losses.logits.soft_target.SoftTarget has"):
        declare(good, called="SoftTarget")


def test_a_name_that_is_taken_is_refused():
    def soft_target(student_logits):
        return student_logits.mean()

    with pytest.raises(
        ValueError, match="expected a new name for .*Another, got 'soft_target', which .*SoftTarget has"
    ):

        @registry.register(soft_target)
        class Another(Loss):
            inputs = {"student_logits": Spec("batch classes", grad=True)}

            @staticmethod
            def reference(**inputs):
                return 0.0


def test_aliases_are_a_tuple():
    with pytest.raises(TypeError, match="expected the aliases of ALoss as a tuple, got 'X'; add a comma"):
        declare(good, aliases="X")


def test_an_alias_chooses_settings():
    chosen = pykd.get("rkl")
    loss = chosen(temperature=3.0, kernels="off")
    assert type(loss) is pykd.SoftTarget and loss.kernels == "off"
    assert repr(loss) == repr(pykd.SoftTarget(3.0, form="reverse_kl"))
    assert repr(pickle.loads(pickle.dumps(loss))) == repr(loss)
    assert chosen(2.0, True, "kl").form == chosen(form="kl").form == "kl"  # what is said goes before it
    with pytest.raises(TypeError, match="expected the settings of SoftTarget .*, got the unknown heat; pass"):
        chosen(heat=1.0)
    with pytest.raises(ValueError, match="expected form to be one of .*, got 'all'; pass"):
        chosen(form="all")
    (term,) = recipe.build({"loss": "R-KL", "settings": {"temperature": 4.0}}).named_terms
    assert recipe.build({"loss": "RKL"}).recipe()["settings"]["form"] == "reverse_kl" == term.parts[0].loss.form


@pytest.mark.parametrize(
    ("settings", "error"),
    [({"colour": 1}, "expected the settings of ALoss"), ({"reduction": "max"}, "expected reduction to be one of")],
)
def test_what_an_alias_chooses_is_a_setting(settings, error):
    with pytest.raises((TypeError, ValueError), match=error):
        declare(good, aliases=(Alias("one-that-is-free", **settings),))


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(
        ValueError,
        match=r"expected the name of a loss \(.*soft_target.*\) or an alias, got 'nothing like it'; `pykd list`",
    ):
        pykd.get("nothing like it")
    for wrong, near in (("sof-targte", "soft_target"), ("decoupledKDs", "decoupled_kd"), ("DKDD", "DKD")):
        with pytest.raises(ValueError, match=f"got '{wrong}'; did you mean {near}\\? `pykd list`"):
            pykd.get(wrong)
    with pytest.raises(TypeError, match="expected the name of a loss, got 3; pass a string"):
        pykd.get(3)


def test_the_list_is_grouped_and_searched(capsys):
    registry.load_all()
    every = registry.registered()
    assert command_line.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line and not line.startswith(" ")]
    assert heads == sorted({cls.family for cls in every.values()} - {""}) + ["elsewhere"] * ("elsewhere" in heads)
    family = ""
    for line in lines:
        if line in heads:
            family = line
        elif line:
            assert (every[line.split()[0]].family or "elsewhere") == family
    assert len(lines) == len(every) + 2 * len(heads) - 1
    for word in (*heads, "divergence"):
        for given in ([word[:-1]], ["the", word.upper()]):
            assert command_line.main(["list", *given]) == 0
            lines = capsys.readouterr().out.splitlines()
            shown = {line.split()[0]: line for line in lines if line.startswith(" ")}
            assert shown.keys() >= {
                name for name, cls in every.items() if word == (cls.family or "elsewhere") and len(given) == 1
            }
            for name, line in shown.items():
                assert all(one.casefold() in f"{every[name].family or 'elsewhere'} {line}".casefold() for one in given)
    for name, cls in every.items():
        for alias in cls.aliases:
            assert command_line.main(["list", alias.swapcase(), cls.family]) == 0
            assert f"  {name} " in capsys.readouterr().out
