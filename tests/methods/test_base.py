"""What methods that learn and methods that are fitted share, and what only one kind has."""

import pytest
from support.tiny import make_model

from bayeslora.methods import METHODS, Ensemble, Inference, Laplace, Map, Method, PostHoc, Swag
from bayeslora.methods.base import settings
from bayeslora.methods.records import recall
from bayeslora.methods.trainer_log import MetricsCallback


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_or_is_fitted_and_never_both(name):
    method = METHODS[name]()
    assert isinstance(method, Inference)
    assert isinstance(method, Method) != isinstance(method, PostHoc)
    assert hasattr(method, "posterior") == isinstance(method, Method)
    assert hasattr(method, "fit") == isinstance(method, PostHoc)


def test_a_method_that_is_fitted_trains_plainly_and_notes_the_run():
    model = make_model()
    kwargs = Laplace().trainer_kwargs(model, 24)
    assert kwargs.keys() == {"callbacks"}
    _, _, recorder, _ = kwargs["callbacks"]
    recorder.on_train_begin(None, None, None, model=model)
    record = recall(model, "laplace")
    assert record is not None
    assert record.num_data == 24


def test_the_settings_of_a_method_inside_a_method_have_its_name():
    found = settings(Ensemble(2, Swag("diagonal")))
    assert found["members"] == 2
    assert found["member"] == {"name": "swag", **settings(Swag("diagonal"))}
    assert "name" not in settings(Map())


def test_metrics_are_in_the_log_alone_where_nobody_has_a_list_of_callbacks():
    class State:
        log_history = [{"loss": 1.0}]  # noqa: RUF012

    callback, logs = MetricsCallback("swag", lambda state: {"rank": 3}), {"loss": 1.0}
    callback.on_train_begin(None, None, None)
    callback.on_log(None, State, None, logs=logs)
    assert logs == State.log_history[-1] == {"loss": 1.0, "swag_rank": 3}
    callback.on_log(None, State, None, logs={"eval_loss": 1.0})
    assert State.log_history == [{"loss": 1.0, "swag_rank": 3}]
