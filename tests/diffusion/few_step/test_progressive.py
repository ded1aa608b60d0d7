"""Progressive distillation: a student's step is two of its teacher's."""

import pytest
import torch

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise
from reverie.diffusion.denoisers import Denoiser, Estimate
from reverie.diffusion.few_step.progressive import Progressive
from reverie.diffusion.grids import trailing
from reverie.diffusion.predictions import per_sample
from reverie.diffusion.registry import schedules
from reverie.diffusion.samplers.base import sample
from reverie.diffusion.samplers.ddim import DDIM
from reverie.diffusion.schedules import Flow, table

F64 = torch.float64


class Student(Denoiser):
    """The perfect student of a teacher."""

    def __init__(self, teacher, steps):
        super().__init__()
        self.schedule, self.objective = teacher.schedule, Progressive(teacher, steps)

    def forward(self, x, t, condition=None):
        x0 = self.objective.aim(x, *self.objective.times(self.schedule, t), condition)
        alpha, sigma = (per_sample(value, x) for value in self.schedule.marginal(t))
        return Estimate(x0, (x - alpha * x0) / sigma)


@pytest.mark.parametrize("name", ["flow", "cosine", "vp"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_perfect_student_walks_with_its_teacher(name, steps, gaussian):
    """N steps of DDIM by the student are 2 N of the teacher."""
    teacher = gaussian(schedules[name]())
    theirs = sample(DDIM(), teacher, (2,), trailing(teacher.schedule, 2 * steps), Noise([1, 2]))
    ours = sample(DDIM(), Student(teacher, steps), (2,), trailing(teacher.schedule, steps), Noise([1, 2]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_alone_has_no_loss(gaussian):
    teacher = gaussian(Flow())
    x0, eps = teacher.draw(6, 1), torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 1, 6, dtype=F64)
    objective = Progressive(teacher, 2)
    assert objective(Student(teacher, 2), x0, t, eps).max() < 1e-20
    assert objective(teacher, x0, t, eps).min() > 1e-6


def test_the_times_of_a_step():
    schedule = table("linear", 10)

    class Still(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = schedule

        def forward(self, x, t, condition=None):
            return Estimate(x, x)

    t, middle, s = Progressive(Still(), 5).times(schedule, torch.tensor([0.1, 0.2, 0.3, 1.0], dtype=F64))
    torch.testing.assert_close(t, torch.tensor([0.2, 0.2, 0.4, 1.0], dtype=F64))
    torch.testing.assert_close(middle, torch.tensor([0.1, 0.1, 0.3, 0.9], dtype=F64))
    torch.testing.assert_close(s, torch.tensor([0.0, 0.0, 0.2, 0.8], dtype=F64))
    with pytest.raises(UsageError, match="steps is 12"):
        Progressive(Still(), 6)


def test_the_weight_is_truncated_snr(gaussian):
    """The squared error of x_0 counts alpha^2 / sigma^2 times, but never less than once."""
    teacher = gaussian(Flow())

    class Off(Student):
        def forward(self, x, t, condition=None):
            estimate = super().forward(x, t, condition)
            return Estimate(estimate.x0 + 0.1, estimate.eps)

    x0 = torch.zeros(2, 2, dtype=F64)
    losses = Progressive(teacher, 4)(Off(teacher, 4), x0, torch.tensor([0.2, 0.9], dtype=F64), x0 + 1)
    torch.testing.assert_close(losses, torch.tensor([0.01 * 9, 0.01], dtype=F64))
