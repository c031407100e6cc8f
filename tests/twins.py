"""Formulas and their twins: the check that a formula passes is the check that every wrong version of it must fail.

A check is a test whose arguments are the formula, by default the library's own:

    @twins.rejected({"sign": dict(loss=lambda logits, y: -attacks.margin_loss(logits, y))})
    def test_the_margin_loss(loss=attacks.margin_loss):
        assert loss(...) == ...

`pytest -v` then shows `test_the_margin_loss[the formula]`, which must pass, and `test_the_margin_loss[sign]`, whose
check must raise an AssertionError.
"""

from collections.abc import Callable, Iterator

import pytest


def rejected(slips: dict[str, dict]) -> Callable:
    """Turn a check into a test of the formula and of every slip, given as the check's changed arguments.

    Errors      ValueError for no slips: a check without a twin has not shown that it can fail
    """
    if not slips:
        raise ValueError("expected at least one slip that the check must reject, got none.")

    def decorator(check: Callable) -> Callable:
        cases = [pytest.param({}, id="the formula")]
        cases += [pytest.param(changed, id=slip) for slip, changed in slips.items()]

        @pytest.mark.parametrize("changed", cases)
        def test(changed):
            if not changed:
                check()
                return
            with pytest.raises(AssertionError):
                check(**changed)

        # not functools.wraps: pytest would look for the check's arguments behind it
        test.__name__ = check.__name__
        test.__qualname__ = check.__qualname__
        test.__module__ = check.__module__
        test.__doc__ = check.__doc__
        test.check = check
        return test

    return decorator


def scaled(function: Callable, factor: float) -> Callable:
    """A twin that returns its formula times a constant."""
    return lambda *arguments, **options: factor * function(*arguments, **options)


def patched(function: Callable, place, **changes) -> Callable:
    """A twin that runs a function of the library while names of a module or class there mean something else.

    An iterator is run to its end, as nothing is changed any more when it is asked for more.
    """

    def twin(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            for name, change in changes.items():
                patch.setattr(place, name, change)
            result = function(*arguments, **options)
            return list(result) if isinstance(result, Iterator) else result

    return twin
