import diffusers.optimization
import pytest
from builders.optimizers import build

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.optimizer.rates import build_schedule

SCHEDULES = [
    ("constant", 0, {}),
    ("constant_with_warmup", 4, {}),
    ("linear", 4, {}),
    ("cosine", 4, {}),
    ("cosine_with_restarts", 4, {"num_cycles": 3}),
    ("polynomial", 4, {"power": 2.0}),
    ("piecewise_constant", 0, {"step_rules": "1:5,0.1:12,0.01"}),
]


@pytest.mark.parametrize(("name", "warmup", "arguments"), SCHEDULES)
def test_every_schedule_is_diffusers_s(name, warmup, arguments):
    """The rates of each step, in any order, equal those of diffusers' scheduler."""
    optimizer, reference = build("SGD"), build("SGD")
    settings = OptimizerSettings(schedule=name, warmup_steps=warmup, schedule_arguments=arguments)
    schedule = build_schedule(optimizer, settings, 20)
    function = diffusers.optimization.TYPE_TO_SCHEDULER_FUNCTION[
        diffusers.optimization.SchedulerType(name)
    ]
    steps = {"num_warmup_steps": warmup} if warmup else {}
    steps |= (
        {"num_training_steps": 20}
        if name not in ("constant", "constant_with_warmup", "piecewise_constant")
        else {}
    )
    scheduler = function(reference, **steps, **arguments)
    expected = []
    for _ in range(20):
        expected.append([group["lr"] for group in reference.param_groups])
        reference.step()
        scheduler.step()
    for step in reversed(range(20)):
        rates = schedule.set_rates(step)
        assert rates == {"lr_unet": expected[step][0], "lr_text": expected[step][1]}
        assert [group["lr"] for group in optimizer.param_groups] == expected[step]
    assert name == "constant" or len({rate for rate, _ in expected}) > 2


def test_rates_need_no_state():
    """A loaded optimizer state, which has rates of its own step, does not change the schedule."""
    optimizer, saved = build("SGD"), build("SGD")
    settings = OptimizerSettings(schedule="linear")
    build_schedule(saved, settings, 10).set_rates(9)
    schedule = build_schedule(optimizer, settings, 10)
    optimizer.load_state_dict(saved.state_dict())
    assert schedule.set_rates(5) == {"lr_unet": 1e-2 * 0.5, "lr_text": 1e-3 * 0.5}


@pytest.mark.parametrize(
    ("changes", "rate", "message"),
    [
        (
            {"schedule": "polynomial"},
            1e-8,
            (
                "polynomial cannot move a rate of 1e-08 over 20 steps .*"
                "must be smaller than initial lr"
            ),
        ),
        (
            {"schedule": "piecewise_constant", "schedule_arguments": {"step_rules": "1.1.1:5,0.1"}},
            1e-4,
            "'step_rules': '1.1.1:5,0.1'.*could not",
        ),
    ],
)
def test_what_a_schedule_refuses(changes, rate, message):
    """A rate or argument that the schedule refuses is told with its message at the start."""
    optimizer = build()
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(ConfigError, match=message):
        build_schedule(optimizer, OptimizerSettings(**changes), 20)
