"""Checks that must fail do fail, and say why; predictions never raise and work without a browser."""

import math

import ipywidgets
import numpy as np
import pytest
import torch
from diffclass import course
from diffclass.course.checks import CheckFailed, check, check_less, check_true
from diffclass.course.shorthand import photographs
from diffclass.data import cifar, gallery
from PIL import Image

WANT = torch.tensor([[0.3, 1.2, 2.5], [0.7, 3.1, 0.4]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _empty_ledger():
    course.clear_ledger()
    yield
    course.clear_ledger()


# ---------------------------------------------------------------------------------------------------------------------
# check


def test_pass_prints_one_line(capsys):
    check("abar", WANT + 3e-8, WANT, tol=1e-6)
    assert capsys.readouterr().out == "✓ abar   max|Δ| = 3.0e-08 ≤ 1e-06\n"


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (1.0, 1),
        (True, True),
        ([1, 2], np.array([1.0, 2.0])),
        (WANT.float(), WANT.float().tolist()),
        (torch.ones(3, requires_grad=True), 1.0),
        (torch.ones(1), 1.0),
        (-math.inf, -math.inf),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2)),
    ],
)
def test_kinds_that_can_be_equal(got, want):
    check("same", got, want, tol=0)
    assert course.ledger().passed == 1


def test_failure_names_the_worst_place():
    got = WANT.clone()
    got[1, 2] += 0.5
    with pytest.raises(
        CheckFailed, match=r"loss: max\|Δ\| = 0.5 > 1e-06 at \[1, 2\]: got 0.9, wanted 0.4"
    ):
        check("loss", got, WANT, tol=1e-6)


def test_tolerance_is_the_limit():
    check("edge", 1.5, 1.0, tol=0.5)
    with pytest.raises(CheckFailed):
        check("edge", 1.5, 1.0, tol=0.4999)


def test_relative_divides_by_the_wanted_value():
    check("big", 1e6 + 1, 1e6, tol=1e-5, relative=True)
    with pytest.raises(CheckFailed):
        check("big", 1e6 + 1, 1e6, tol=1e-5)
    with pytest.raises(CheckFailed):
        check("zero", [1e-9, 1.0], [0.0, 1.0], tol=1e-5, relative=True)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (math.nan, math.nan),
        ([1.0, math.nan], [1.0, 2.0]),
        ([1.0], math.nan),
        (math.inf, -math.inf),
        (math.inf, 1.0),
    ],
)
def test_nan_and_infinity_never_pass(got, want):
    with pytest.raises(CheckFailed):
        check("n", got, want, tol=1e300)
    with pytest.raises(CheckFailed):
        check("n", got, want, tol=1e300, relative=True)


def test_nan_is_counted_and_explained():
    with pytest.raises(CheckFailed, match="got has 1 NaN among 2 values; likely 0/0"):
        check("n", [1.0, math.nan], [1.0, 2.0], se=[0.1, 0.1])
    with pytest.raises(CheckFailed, match="the wanted value has 2 NaN"):
        check("n", [1.0, 1.0], [math.nan, math.nan], tol=1)


@pytest.mark.parametrize("got", [WANT[0], WANT[None], WANT.T, torch.tensor(1.0)])
def test_shapes_are_never_stretched(got):
    with pytest.raises(CheckFailed, match="shapes are never stretched"):
        check("shape", got, WANT, tol=1e9)


def test_transposed_shape_is_recognised():
    with pytest.raises(CheckFailed, match="transpose"):
        check("shape", WANT.T, WANT, tol=1e-6)


@pytest.mark.parametrize(
    ("got", "cause"),
    [
        (2 * WANT, "factor 1/2 missing"),
        (WANT / 2, "factor 1/2 too many"),
        (4 * WANT, "model units is four times"),
        (WANT / 4, "quarter"),
        (-WANT, "sign is flipped"),
        (math.sqrt(2) * WANT, r"sqrt\(2\)"),
        (WANT**2, "square of what is wanted"),
        (WANT**0.5, "square root"),
        (1 / WANT, "reciprocal"),
        (WANT.log(), "is the logarithm"),
        (WANT.exp(), "is the exponential"),
        (WANT + 0.7, "same constant 0.7"),
        (3072 * WANT, "3072 times too large: a sum where a mean"),
        (WANT / 48, "48 times too small: a mean where a sum"),
        (1.37 * WANT, "factor 1.37"),
        (WANT.flip(1), "another order"),
        (WANT * 1.0001, "three digits"),
    ],
)
def test_likely_cause(got, cause):
    with pytest.raises(CheckFailed, match=cause):
        check("pattern", got, WANT, tol=1e-6)


def test_likely_cause_of_square_matrices_and_probabilities():
    square = torch.tensor([[1.0, 2.0], [-3.0, 4.0]])
    with pytest.raises(CheckFailed, match="transposed"):
        check("pattern", square.T, square, tol=1e-6)
    p = torch.tensor([0.1, 0.35, 0.8])
    with pytest.raises(CheckFailed, match="one minus"):
        check("pattern", 1 - p, p, tol=1e-6)


def test_no_cause_is_invented():
    got = WANT + torch.tensor([[0.5, -0.2, 0.3], [-0.6, 0.1, 0.2]])
    with pytest.raises(CheckFailed) as caught:
        check("pattern", got, WANT, tol=1e-6)
    assert str(caught.value).endswith("wanted 0.7.")


@pytest.mark.parametrize(
    "arguments", [{}, {"tol": 1.0, "se": 1.0}, {"tol": -1.0}, {"tol": math.nan}, {"tol": True}]
)
def test_one_honest_criterion(arguments):
    with pytest.raises(ValueError, match="tol"):
        check("x", 1.0, 1.0, **arguments)


@pytest.mark.parametrize("got", ["1.0", None, {"a": 1}, object(), 1j])
def test_only_numbers(got):
    with pytest.raises(TypeError, match="expected numbers"):
        check("x", got, 1.0, tol=1)


def test_nothing_is_not_checked():
    with pytest.raises(ValueError, match="something to check"):
        check("x", [], [], tol=1)


# Standard errors


def test_four_standard_errors(capsys):
    check("mean", 1.039, 1.0, se=0.01)
    assert "|z| = 3.90 ≤ 4" in capsys.readouterr().out
    with pytest.raises(
        CheckFailed, match=r"\|z\| = 4.10 > 4: got 1.041, wanted 1, standard error 0.01"
    ):
        check("mean", 1.041, 1.0, se=0.01)


def test_each_value_has_its_own_standard_error():
    check("means", [1.0, 2.3], [1.0, 2.0], se=[0.01, 0.1])
    with pytest.raises(CheckFailed, match=r"at \[0\]"):
        check("means", [1.3, 2.0], [1.0, 2.0], se=[0.01, 0.1])


def test_averages_of_real_noise_pass_about_as_often_as_they_should():
    noise = np.random.default_rng(0).normal(1.0, 1.0, (3000, 400))
    mean = noise.mean(1)
    se = noise.std(1, ddof=1) / 20
    failures = 0
    for m, s in zip(mean, se, strict=True):
        try:
            check("mean", m, 1.0, se=s)
        except CheckFailed:
            failures += 1
    assert failures <= 4
    with pytest.raises(CheckFailed, match="a factor 1/2 missing"):
        check("variance", 2 * (noise**2).mean(), 2.0, se=0.003)


@pytest.mark.parametrize("se", [0.0, -0.1, math.nan, math.inf, [0.1, 0.0]])
def test_standard_error_must_be_positive(se):
    with pytest.raises(ValueError, match="standard errors > 0"):
        check("mean", [1.0, 1.0], [1.0, 1.0], se=se)


def test_vacuous_standard_error_is_refused():
    with pytest.raises(ValueError, match="cannot fail"):
        check("mean", 1.0, 1.0, se=0.26)
    check("mean of zero", 0.01, 0.0, se=0.01)
    with pytest.raises(ValueError, match="cannot fail"):
        check("mean of zero", 0.01, 0.0, se=0.01, scale=0.03)


def test_standard_error_shape_and_relative():
    with pytest.raises(ValueError, match="one standard error, or one for each"):
        check("mean", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], se=[0.1, 0.1])
    with pytest.raises(ValueError, match="relative"):
        check("mean", 1.0, 1.0, se=0.1, relative=True)


# ---------------------------------------------------------------------------------------------------------------------
# check_true, check_less, ledger


def test_check_true():
    check_true("sorted", torch.tensor(True), "edges ascend")
    check_true("numpy", np.bool_(True), "it is")
    with pytest.raises(CheckFailed, match="is false; it should hold because edges ascend"):
        check_true("sorted", False, "edges ascend")


@pytest.mark.parametrize(
    "condition", [torch.tensor([True, True]), 1, None, "yes", torch.tensor(1.0)]
)
def test_check_true_wants_one_truth_value(condition):
    with pytest.raises(ValueError, match="True or False"):
        check_true("x", condition, "y")


def test_check_less_prints_the_margin(capsys):
    check_less("bound", [1.0, 2.0], [1.5, 2.1])
    assert capsys.readouterr().out == "✓ bound   smallest margin = 0.1 at [1]\n"
    check_less("scalar", 0.0, [0.0, 1.0])
    check_less("noise", 1.05, 1.0, slack=0.1)
    with pytest.raises(
        CheckFailed, match=r"margin = -0.05; the bound is broken by 0.05, and 0 is allowed"
    ):
        check_less("noise", 1.05, 1.0)


@pytest.mark.parametrize(
    ("small", "large"), [(math.nan, 1.0), ([1.0, 1.0, 1.0], [2.0, 2.0]), (math.inf, math.inf)]
)
def test_check_less_fails_on_what_cannot_be_compared(small, large):
    with pytest.raises(CheckFailed), np.errstate(invalid="ignore"):
        check_less("bound", small, large)


@pytest.mark.parametrize("slack", [-1.0, math.inf, math.nan])
def test_check_less_slack(slack):
    with pytest.raises(ValueError, match="slack"):
        check_less("bound", 0.0, 1.0, slack=slack)


def test_ledger_lists_each_check_once_and_its_last_result():
    check("a < b", 1.0, 1.0, tol=0.1)
    with pytest.raises(CheckFailed):
        check("c", 1.0, 2.0, tol=0.1)
    assert (len(course.ledger()), course.ledger().passed) == (2, 1)
    assert "✗ c" in repr(course.ledger())
    check("c", 2.0, 2.0, tol=0.1)
    table = course.ledger()
    assert (len(table), table.passed) == (2, 2)
    assert repr(table).startswith("2 of 2 checks hold\n✓ a < b")
    assert "a &lt; b" in table._repr_html_() and "<summary>2 of 2" in table._repr_html_()
    course.clear_ledger()
    assert len(course.ledger()) == 0


# ---------------------------------------------------------------------------------------------------------------------
# predict and reveal


def widgets_of(prediction, kind):
    found = []
    waiting = [prediction.box]
    while waiting:
        widget = waiting.pop()
        waiting.extend(getattr(widget, "children", ()))
        if isinstance(widget, kind):
            found.append(widget)
    return found


def test_choice_by_click(capsys):
    guess = course.predict("Which weight wins?", ["ELBO", "EDM"])
    (radio,) = widgets_of(guess, ipywidgets.RadioButtons)
    assert guess.value is None and radio.description
    course.reveal(guess, "EDM")
    radio.value = "EDM"
    assert guess.value == "EDM"
    course.reveal(guess, "EDM")
    guess.value = "ELBO"
    assert radio.value == "ELBO"
    course.reveal(guess, "EDM")
    assert capsys.readouterr().out.splitlines() == [
        "You made no prediction; the answer is EDM.",
        "You predicted EDM: right.",
        "You predicted ELBO, actual EDM: have another look at why.",
    ]


def test_number_counts_only_once_committed(capsys):
    guess = course.predict("How many votes?", unit="votes")
    (field,) = widgets_of(guess, ipywidgets.FloatText)
    (button,) = widgets_of(guess, ipywidgets.Button)
    field.value = 500.0
    assert guess.value is None
    button.click()
    assert guess.value == 500.0
    course.reveal(guess, torch.tensor(1000))
    assert (
        capsys.readouterr().out
        == "You predicted 500 votes, actual 1000 votes: too low by a factor 2.\n"
    )


@pytest.mark.parametrize(
    ("guess", "actual", "words"),
    [
        (3.0, 1.0, "too high by a factor 3"),
        (1.0, 1.01, "right on the spot"),
        (-1.0, 2.0, "off by 3; the sign differs"),
        (0.0, 2.0, "off by 2"),
        (-4.0, -2.0, "too high by a factor 2"),
        (1.0, math.nan, "not finite"),
    ],
)
def test_distance_in_words(guess, actual, words, capsys):
    course.reveal(course.predict("?", answer=guess), actual)
    assert capsys.readouterr().out.rstrip().endswith(f"{words}.")


@pytest.mark.parametrize(
    "actual", [None, "text", [1, 2], np.ones(3), torch.ones(2, 2), math.inf, True, 0]
)
@pytest.mark.parametrize("prediction", [None, 3, "ELBO", "number", "choice"])
def test_reveal_never_raises(prediction, actual, capsys):
    if prediction == "number":
        prediction = course.predict("?", answer=2.0)
    elif prediction == "choice":
        prediction = course.predict("?", ["a", "b"], answer="a")
    course.reveal(prediction, actual)
    assert capsys.readouterr().out.startswith("You ")


def test_reveal_writes_under_the_question():
    guess = course.predict("?", ["a <", "b"], answer="a <")
    course.reveal(guess, "a <")
    assert any(
        "You predicted a &lt;: right." in w.value and "aria-live" in w.value
        for w in widgets_of(guess, ipywidgets.HTML)
    )


def test_prediction_shows_itself_as_core_widgets_without_output():
    guess = course.predict("Is 1 < 2?", ["yes", "no"])
    bundle = guess._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in (
        bundle[0] if isinstance(bundle, tuple) else bundle
    )
    assert "1 &lt; 2" in widgets_of(guess, ipywidgets.HTML)[-1].value or any(
        "1 &lt; 2" in w.value for w in widgets_of(guess, ipywidgets.HTML)
    )
    assert not widgets_of(guess, ipywidgets.Output)


def test_impossible_predictions_are_named():
    with pytest.raises(ValueError, match="at least two options"):
        course.predict("?", ["only"])
    with pytest.raises(ValueError, match="expected one of"):
        course.predict("?", ["a", "b"], answer="c")


# -- photographs ---------------------------------------------------------------------------------------------------------


def test_photographs_are_generated_ones_where_there_are_no_others(monkeypatch, capsys):
    monkeypatch.setattr(cifar, "cifar10_available", lambda: (False, "absent"))
    images, labels, kind = photographs(20)
    drawn, classes = gallery.pictures()
    assert kind == "Generated" and "diffclass download cifar10" in capsys.readouterr().out
    assert torch.equal(torch.bincount(labels), torch.full((10,), 2)), "of every class equally many"
    for image, label in zip(images, labels, strict=True):
        assert torch.equal(image, drawn[(drawn == image).flatten(1).all(1)][0])
        assert classes[(drawn == image).flatten(1).all(1)][0] == label
    assert torch.equal(photographs(len(drawn) + 1)[0], drawn)


def test_photographs_put_the_readers_own_first_and_refuse_other_classes(monkeypatch, tmp_path):
    monkeypatch.setattr(cifar, "cifar10_available", lambda: (False, "absent"))
    file = tmp_path / "red.png"
    Image.new("RGB", (640, 480), (255, 0, 0)).save(file)
    images, labels, _ = photographs(10, own={file: "ship"})
    assert images.shape == (11, 3, 32, 32) and int(labels[0]) == 8
    assert torch.equal(images[0].amax((1, 2)), torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="dragon"):
        photographs(10, own={file: "dragon"})
    with pytest.raises(FileNotFoundError, match="no such file"):
        photographs(10, own={tmp_path / "none.png": "ship"})


# -- in a notebook -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    """The outputs of a few cells, run in a kernel as a notebook runs them."""
    import nbclient
    import nbformat

    cells = [
        "from diffclass.course import check, grade, predict, reveal\n"
        "from diffclass.course.checks import CheckFailed\n"
        "from diffclass.course import exercises",
        "check('one', 1.0, 1.0, tol=0.1)",
        "check('two <', 2.0, 2.0, tol=0.1)\nprint('between')\ncheck('three', 3.0, 3.0, tol=0.1)",
        "try:\n    check('planted', 1.0, 2.0, tol=0.1)\nexcept CheckFailed as red:\n    print('red:', red)",
        "guess = predict('Which?', ['a', 'b'])\nreveal(guess, 'b')",
        "guess.value = 'a'\nstatus = guess._status.value\nreveal(guess, 'b')\nprint(status)",
        "check('four', 1.0, 2.0, tol=0.1)",
        "grade(exercises.TWEEDIE, lambda x, sigma, score: x - sigma**2 * score)",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(book, allow_errors=True, kernel_name="python3").execute()
    return [cell.outputs for cell in book.cells]


def test_one_check_is_a_line_and_more_fold_to_one(page):
    (one,) = page[1]
    assert "✓ one" in one.data["text/html"] and "<details" not in one.data["text/html"]
    fold, between = page[2]
    assert "<summary>✓ 2 checks hold</summary>" in fold.data["text/html"]
    assert "✓ two &lt;" in fold.data["text/html"] and "✓ three" in fold.data["text/html"]
    assert fold.data["text/plain"].count("✓") == 2 and between.text == "between\n"


def test_a_planned_failure_shows_no_card(page):
    (printed,) = page[3]
    assert printed.output_type == "stream" and printed.text.startswith("red: planted")


def test_what_fails_is_one_card_with_the_traceback_folded(page):
    for place, what, why in (
        (6, "four", "got 1, wanted 2"),
        (7, "tweedie", "walks away from the data"),
    ):
        card, error = page[place]
        shown = card.data["text/html"]
        assert what in shown.lower() and why in shown
        assert "<summary>traceback</summary>" in shown and "<details open" not in shown
        assert error.output_type == "error" and len(error.traceback) == 1
        assert "\n" not in error.traceback[0]


def test_an_answer_waits_for_a_prediction(page):
    (answer,) = page[4]
    assert answer.output_type == "display_data"
    assert answer.data["text/html"].startswith("<details><summary>The answer waits")
    (told,) = page[5]
    assert told.text.startswith("You predicted a, actual b")
    assert "You predicted a, actual b" in told.text.splitlines()[1]
