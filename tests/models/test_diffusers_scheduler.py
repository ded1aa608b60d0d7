"""Our samplers in pipelines of diffusers: the same images as ours, and nothing swallowed."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import nn

from reverie.base.errors import UsageError
from reverie.base.randomness import Noise, normal
from reverie.diffusion.denoisers import Clipped, NetworkDenoiser
from reverie.diffusion.process import diffuse
from reverie.diffusion.registry import grids, samplers, schedules
from reverie.diffusion.samplers.base import run
from reverie.models.diffusers_scheduler import as_scheduler

F64 = torch.float64
LINEAR = schedules["linear"]()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=4, **blocks).eval()


class Plain(nn.Module):
    """Their network with our call."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, time):
        return self.unet(x, time).sample


class Net(nn.Module):
    """A fixed network, smooth in all that it is given."""

    def forward(self, x, time):
        return 0.3 * torch.tanh(x) + 0.1 * torch.cos(time / 200).reshape(-1, *[1] * (x.ndim - 1))


def ours(sampler, network, x, grid, seeds, clip=None, schedule=LINEAR, prediction="eps"):
    denoiser = NetworkDenoiser(network, schedule, prediction)
    denoiser = denoiser if clip is None else Clipped(denoiser, clip)
    *_, last = run(sampler, denoiser, sampler.init(x, grid[0].item()), grid, Noise(seeds))
    return last.x


def loop(scheduler, network, x, steps, **options):
    """What StableDiffusionPipeline does with a scheduler."""
    scheduler.set_timesteps(steps, device="cpu")
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t)
        output = network(shown, t.to(x.dtype).expand(len(x)))
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


@pytest.mark.parametrize(("name", "schedule", "prediction"), [("heun", "linear", "eps"), ("dpm2", "edm", "edm")])
def test_the_preview_is_that_of_the_time_asked_also_within_a_step(name, schedule, prediction):
    """pred_original_sample is the estimate at the x and the time that the model was shown."""
    schedule = schedules[schedule]()
    scheduler = as_scheduler(samplers[name](), schedule, prediction)
    denoiser = NetworkDenoiser(Net(), schedule, prediction)
    asked = []
    denoiser.register_forward_hook(lambda module, inputs, estimate: asked.append(estimate.x0))
    x = normal((2, 1, 4, 4), 0, "start").double() * schedule.prior_std(torch.ones(1, dtype=F64))
    grid = grids["trailing"](schedule, 4)
    list(run(samplers[name](), denoiser, samplers[name]().init(x, 1.0), grid, Noise([0, 1])))
    scheduler.set_timesteps(4)
    for t, want in zip(scheduler.timesteps, asked, strict=True):
        output = Net()(scheduler.scale_model_input(x, t), t.to(x.dtype).expand(2))
        step = scheduler.step(output, t, x)
        torch.testing.assert_close(step.pred_original_sample, want, rtol=1e-5, atol=1e-5)
        x = step.prev_sample


def pictures(x):
    """What their pipelines make of samples."""
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp-2m", "unipc", "heun"])
def test_ddpm_pipeline_makes_our_images(name, unet):
    sampler = samplers[name]()
    pipeline = DDPMPipeline(unet, as_scheduler(sampler, LINEAR, "v"))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    found = pipeline(2, generator, num_inference_steps=6, output_type="np").images
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    want = ours(sampler, Plain(unet), x, grids["trailing"](LINEAR, 6), [5, 6], prediction="v")
    assert (want.abs() < 1).double().mean() > 0.3  # what their pictures do not clip
    torch.testing.assert_close(torch.from_numpy(found), pictures(want), rtol=0, atol=1e-5)


def test_ddim_pipeline_takes_it_in_place_of_its_own(unet):
    pipeline = DDIMPipeline(unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = as_scheduler(samplers["dpmpp-2m"](), LINEAR, "v", grid="leading", clip=0.9)
    generators = [torch.Generator().manual_seed(seed) for seed in (9, 4)]
    found = pipeline(2, generators, num_inference_steps=5, output_type="np").images
    rows = [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (9, 4)]
    grid = grids["leading"](LINEAR, 5)
    want = ours(samplers["dpmpp-2m"](), Plain(unet), torch.cat(rows), grid, [9, 4], clip=0.9, prediction="v")
    torch.testing.assert_close(
        torch.from_numpy(found), (want / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), atol=1e-5, rtol=0
    )
    with pytest.raises(UsageError, match=r"set pipeline.scheduler afterwards"):
        DDIMPipeline(unet, pipeline.scheduler)
    with pytest.raises(UsageError, match=r"eta is 0.5, which the pipeline can't set"):
        pipeline(1, num_inference_steps=2, eta=0.5)
    with pytest.raises(UsageError, match="use_clipped_model_output, which DPMpp2M"):
        pipeline(1, num_inference_steps=2, use_clipped_model_output=True)


@pytest.mark.parametrize("name", sorted(set(samplers) - {"edm", "adaptive", "mean-flow"}))
def test_every_sampler_in_a_loop_of_these_methods_only(name):
    sampler, x = samplers[name](), normal((2, 1, 4, 4), 0, "start").double()
    scheduler = as_scheduler(sampler, LINEAR)
    found = loop(scheduler, Net(), x, 6, generator=torch.Generator().manual_seed(3))
    grid = grids["trailing"](LINEAR, 6)
    assert len(scheduler.timesteps) == sampler.count(LINEAR, grid)
    torch.testing.assert_close(found, ours(sampler, Net(), x, grid, [3, 4]), rtol=1e-5, atol=1e-5)


def test_a_sampler_that_tells_more_than_the_time_is_no_scheduler():
    with pytest.raises(UsageError, match="span"):
        as_scheduler(samplers["mean-flow"](), LINEAR).set_timesteps(4)


@pytest.mark.parametrize(
    ("name", "schedule", "prediction", "grid"),
    [("heun", "edm", "edm", "karras"), ("dpm2", "flow", "velocity", "trailing"), ("ddim", "ve", "edm", "log-snr")],
)
def test_other_schedules_and_predictions(name, schedule, prediction, grid):
    """The model sees c_in x, and the start has the schedule's own scale."""
    at = schedules[schedule]()
    x, times = normal((2, 1, 4, 4), 0, "start").double(), grids[grid](at, 6)
    found = loop(as_scheduler(samplers[name](), at, prediction, grid), Net(), x, 6)
    scale = at.prior_std(times[:1]).item()
    want = ours(samplers[name](), Net(), scale * x, times, [0, 0], schedule=at, prediction=prediction)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_learned_variance():
    """The network's output has twice the channels."""

    class Double(Net):
        def forward(self, x, time):
            return torch.cat([super().forward(x, time), torch.tanh(x)], 1)

    sampler, grid = samplers["ddpm"]("learned"), grids["trailing"](LINEAR, 6)
    x = normal((2, 1, 4, 4), 0, "start").double()
    scheduler = as_scheduler(sampler, LINEAR, learned_variance=True)
    found = loop(scheduler, Double(), x, 6, generator=torch.Generator().manual_seed(3))
    denoiser = NetworkDenoiser(Double(), LINEAR, "eps", learned_variance=True)
    *_, last = run(sampler, denoiser, sampler.init(x, 1.0), grid, Noise([3, 4]))
    torch.testing.assert_close(found, last.x, rtol=1e-5, atol=1e-5)


def test_the_estimate_and_the_attributes():
    scheduler = as_scheduler(samplers["heun"](), LINEAR, "v")
    assert scheduler.config.prediction_type == scheduler.config["prediction_type"] == "v_prediction"
    assert not hasattr(scheduler.config, "steps_offset")
    assert scheduler.config.get("steps_offset", 7) == 7
    assert scheduler.init_noise_sigma == 1
    assert len(scheduler) == 1000
    assert scheduler.step_index is None
    scheduler.set_timesteps(4)
    assert (scheduler.order, scheduler.num_inference_steps, scheduler.timesteps.dtype) == (2, 4, torch.int64)
    x, v = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
    output = scheduler.step(v, scheduler.timesteps[0], x)
    alpha, sigma = LINEAR.marginal(torch.ones(1, dtype=F64))
    torch.testing.assert_close(output.pred_original_sample, (alpha * x - sigma * v).float())
    assert scheduler.step_index == 1


def test_half_precision_is_kept_between_steps_only_for_the_pipeline():
    """What the pipeline holds is float16; the state is float32, as long as nobody changed the samples."""
    x = normal((1, 1, 4, 4), 0, "start").half()
    scheduler = as_scheduler(samplers["ddim"](), LINEAR)
    found = loop(scheduler, lambda x, t: Net()(x.float(), t.float()).half(), x, 6)
    assert found.dtype == torch.float16
    assert scheduler.state.x.dtype == torch.float32
    assert torch.equal(scheduler.state.x.half(), found)


def test_image_to_image_begins_in_the_middle():
    scheduler, sampler, x = (
        as_scheduler(samplers["heun"](), LINEAR),
        samplers["heun"](),
        torch.ones(1, 1, 2, 2).double(),
    )
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2 * scheduler.order)
    for t in scheduler.timesteps[2 * scheduler.order :]:
        x = scheduler.step(Net()(x, t[None].double()), t, x).prev_sample
    want = ours(sampler, Net(), torch.ones(1, 1, 2, 2).double(), grids["trailing"](LINEAR, 6)[2:], [0])
    torch.testing.assert_close(x, want)


def test_samples_changed_between_steps_are_taken_and_inside_of_one_refused():
    """Inpainting pipelines paste the known part back after every step."""
    x, grid = normal((1, 1, 4, 4), 0, "start").double(), grids["trailing"](LINEAR, 4)
    scheduler = as_scheduler(samplers["ddim"](), LINEAR)
    scheduler.set_timesteps(4)
    y = x
    for t in scheduler.timesteps:
        y = 0.5 * scheduler.step(Net()(y, t[None].double()), t, y).prev_sample
    z, sampler, denoiser = x, samplers["ddim"](), NetworkDenoiser(Net(), LINEAR)
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        z = 0.5 * sampler.step(denoiser, sampler.init(z, t), s, Noise([0])).x
    torch.testing.assert_close(y, z)
    scheduler = as_scheduler(samplers["heun"](), LINEAR)
    scheduler.set_timesteps(4)
    y = scheduler.step(x, 999, x).prev_sample
    with pytest.raises(UsageError, match="changed in the middle of a step"):
        scheduler.step(x, 749, 0.5 * y)


@pytest.mark.parametrize(("schedule", "prediction"), [("linear", "eps"), ("flow", "velocity"), ("edm", "edm")])
def test_add_noise_is_the_forward_process(schedule, prediction):
    at = schedules[schedule]()
    scheduler = as_scheduler(samplers["ddim"](), at, prediction)
    scheduler.set_timesteps(5)
    x0, eps = torch.ones(2, 1, 2, 2), normal((2, 1, 2, 2), 0, "eps")
    found = scheduler.add_noise(x0, eps, scheduler.timesteps[[1, 3]])
    want = diffuse(at, x0, grids["trailing"](at, 5)[[1, 3]], eps)
    torch.testing.assert_close(found, want.float(), rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32


def test_noise_is_fixed_by_the_generators_seed_or_by_torchs():
    x, network = torch.zeros(2, 1, 2, 2), Net()

    def go(**options):
        return loop(as_scheduler(samplers["ddpm"](), LINEAR), network, x, 4, **options)

    seven, again = (go(generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(seven, again)
    torch.manual_seed(0)
    first, second = go(), go()
    torch.manual_seed(0)
    assert torch.equal(first, go())
    assert not torch.equal(first, second)
    with pytest.raises(UsageError, match="1 generators for 2 samples"):
        go(generator=[torch.Generator()])


def test_refusals():
    x = torch.ones(1, 1, 2, 2)
    with pytest.raises(UsageError, match="changes x before it asks the model"):
        as_scheduler(samplers["edm"](), LINEAR).set_timesteps(5)
    with pytest.raises(UsageError, match="asks as often as it sees fit"):
        as_scheduler(samplers["adaptive"](), LINEAR).set_timesteps(5)
    with pytest.raises(UsageError, match="eps-prediction has no meaning"):
        as_scheduler(samplers["ddim"](), schedules["flow"]())
    scheduler = as_scheduler(samplers["ddim"](), LINEAR)
    for call in (lambda: scheduler.step(x, 999, x), lambda: scheduler.scale_model_input(x, 999)):
        with pytest.raises(UsageError, match="set_timesteps"):
            call()
    scheduler.set_timesteps(2)
    with pytest.raises(UsageError, match="timestep 5 begins no step"):
        scheduler.step(x, 5, x)
    scheduler.step(x, 999, x)
    with pytest.raises(UsageError, match="timestep 999 came where 499 is due"):
        scheduler.step(x, 999, x)
    scheduler.step(x, 499, x)
    with pytest.raises(UsageError, match="all 2 timesteps are done"):
        scheduler.step(x, 499, x)
    stochastic = as_scheduler(samplers["euler-ancestral"](), LINEAR)
    stochastic.set_timesteps(2)
    stochastic.step(x, 999, x, eta=0.0)  # a pipeline's default, which says nothing
    stochastic.step(x, 499, x, eta=1.0)
