"""A whole picture of Stable Diffusion 1.5 or XL from a cold process, ours beside diffusers and OpenVINO.

    python benchmarks/stable_diffusion_picture.py --folder FOLDER --steps 20 --json picture.json

Each contestant runs in a process of its own, from imports to the decoded picture: the seconds of importing, of loading
(for OpenVINO converting and compiling too), of the first step, of each further one, of decoding; the most memory that
was resident, and how much of it was taken rather than mapped from the file, which the system can drop. Random weights
of the real architecture, written to FOLDER where it is not there yet (4 GB, 14 for XL); the prompt and its seed are the
same, guidance is 7.5, so that a step is a batch of 2. Where there is a GPU, all but OpenVINO draw there. The relative
error is of one U-Net step, to reverie exact's. What is run once is a hint: `--rounds` repeats all in turn, and medians
are shown.
"""

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGES = ("reverie", "torch", "diffusers", "transformers", "openvino")
PROMPT = "a photograph of an astronaut riding a horse"
CONTESTANTS = ("reverie-exact", "reverie-fast", "reverie-fast-int8", "diffusers", "diffusers-bf16", "openvino")
KNOWN = (*CONTESTANTS, "diffusers-bf16-compiled")
KIB = 1024

# What a process does --------------------------------------------------------------------------------


class Stopwatch:
    """Seconds by name, since this process began to import."""

    def __init__(self) -> None:
        self.seconds: dict[str, Any] = {"steps": []}
        self.taken = 0  # bytes of anonymous memory, the most that was seen
        self.over = threading.Event()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        """Look at the anonymous memory, ten times a second."""
        while not self.over.wait(0.1):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.taken = max(self.taken, int(line.split()[1]) * KIB)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Measure a block."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def found(self) -> dict[str, Any]:
        """Return what was measured."""
        self.over.set()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        return {**self.seconds, "peak": peak, "taken": self.taken}


def device() -> str:
    """Return where all but OpenVINO draw."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def reverie(options: argparse.Namespace, watch: Stopwatch) -> Any:
    """Draw by reverie: the latents, then the picture."""
    with watch.during("import"):
        import torch

        import reverie as rv
        from reverie.models.sampling import execute
    torch.set_num_threads(options.threads)
    _, speed, *weights = options.child.split("-")
    with watch.during("load"):
        model = rv.load(options.folder, device=device(), speed=speed, weights=weights[0] if weights else None)
    plan = model.plan(1, prompt=PROMPT, guidance=7.5, steps=options.steps, size=options.size, sampler="ddim", seed=0)
    last = time.perf_counter()

    def tick(progress: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        watch.seconds["steps"].append(now - last)
        last = now

    from reverie.models.footprint import weights_bytes, working_bytes

    encoders = getattr(model.conditioner, "encoders", [])
    watch.seconds["estimate"] = weights_bytes(model.denoiser.network, model.codec, *encoders)
    watch.seconds["estimate"] += working_bytes(model.denoiser.network, model.codec, plan)
    latents, _ = execute(model.denoiser, plan, tick, model.conditioner)
    with watch.during("decode"):
        model.decoded(latents)
    network = model.denoiser.network
    return lambda x, t, **told: network(x, t, **told)


def diffusers(options: argparse.Namespace, watch: Stopwatch) -> Any:
    """Draw by diffusers' pipeline."""
    with watch.during("import"):
        import torch
        from diffusers import DDIMScheduler, DiffusionPipeline
    torch.set_num_threads(options.threads)
    dtype = torch.bfloat16 if "bf16" in options.child else torch.float32
    with watch.during("load"), torch.inference_mode():
        pipeline = DiffusionPipeline.from_pretrained(options.folder, torch_dtype=dtype, local_files_only=True)
        pipeline.to(device())
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        if options.child.endswith("compiled"):
            pipeline.unet = torch.compile(pipeline.unet.to(memory_format=torch.channels_last), mode="reduce-overhead")
    return draw_by_pipeline(pipeline, options, watch)


def draw_by_pipeline(pipeline: Any, options: argparse.Namespace, watch: Stopwatch) -> Any:
    """Draw by a pipeline of diffusers', and return its U-Net's call."""
    import torch

    last = time.perf_counter()

    def tick(_: Any, step: int, when: Any, told: dict[str, Any]) -> dict[str, Any]:
        nonlocal last
        now = time.perf_counter()
        watch.seconds["steps"].append(now - last)
        last = now
        return told

    with torch.inference_mode():
        latents = pipeline(
            PROMPT, guidance_scale=7.5, num_inference_steps=options.steps, height=options.size, width=options.size,
            generator=torch.Generator().manual_seed(0), output_type="latent", callback_on_step_end=tick,
        ).images  # fmt: skip
        with watch.during("decode"):
            decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)
            decoded[0].cpu()  # there once it is asked for

    def step(x: Any, when: Any, context: Any, pooled: Any = None, sizes: Any = None) -> Any:
        kind = next(pipeline.unet.parameters()).dtype
        added = None if pooled is None else {"text_embeds": pooled.to(kind), "time_ids": sizes.to(kind)}
        return pipeline.unet(x.to(kind), when, context.to(kind), added_cond_kwargs=added, return_dict=False)[0].float()

    return step


def openvino(options: argparse.Namespace, watch: Stopwatch) -> Any:
    """Draw by diffusers' pipeline with U-Net and decoder compiled by OpenVINO, in its own precision."""
    with watch.during("import"):
        import openvino as ov
        import torch
        from diffusers import DDIMScheduler, DiffusionPipeline
    torch.set_num_threads(options.threads)
    settings = {"INFERENCE_NUM_THREADS": options.threads, "PERFORMANCE_HINT": "LATENCY"}

    class Plain(torch.nn.Module):
        def __init__(self, call: Any, network: torch.nn.Module) -> None:
            super().__init__()
            self.call, self.network = call, network

        def forward(self, *inputs: Any) -> Any:
            return self.call(self.network, *inputs)

    def compiled(call: Any, network: torch.nn.Module, *inputs: torch.Tensor) -> Any:
        model = ov.convert_model(Plain(call, network).eval(), example_input=inputs)
        return ov.compile_model(model, "CPU", settings)

    with watch.during("load"), torch.no_grad():
        pipeline = DiffusionPipeline.from_pretrained(options.folder, local_files_only=True)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        side = options.size // 8
        x, when, context = torch.randn(2, 4, side, side), torch.tensor(500.0), torch.randn(2, 77, 768)
        unet = compiled(lambda n, *a: n(*a, return_dict=False)[0], pipeline.unet, x, when, context)
        decoder = compiled(lambda n, z: n.decode(z, return_dict=False)[0], pipeline.vae, x[:1])

    def step(x: Any, when: Any, encoder_hidden_states: Any, **_: Any) -> tuple[torch.Tensor]:
        context = encoder_hidden_states  # by the pipeline's name
        when = torch.as_tensor(when).float().flatten()[0]
        return (torch.from_numpy(unet([x.float().numpy(), when.numpy(), context.float().numpy()])[0]),)

    pipeline.unet.forward = step
    pipeline.vae.decode = lambda z, **_: (torch.from_numpy(decoder([z.numpy()])[0]),)
    draw_by_pipeline(pipeline, options, watch)
    return lambda x, when, context, **_: step(x, when, context)[0]


def child(options: argparse.Namespace) -> None:
    """Run one contestant, and print what it took."""
    watch = Stopwatch()
    call = {"reverie": reverie, "diffusers": diffusers, "openvino": openvino}[options.child.split("-")[0]](
        options, watch
    )
    found = watch.found()
    import torch

    torch.manual_seed(1)
    side = options.size // 8
    told: dict[str, Any] = {"context": torch.randn(2, 77, 2048 if options.xl else 768)}
    told |= {"pooled": torch.randn(2, 1280), "sizes": torch.full((2, 6), float(options.size))} if options.xl else {}
    with torch.inference_mode():
        where = "cpu" if options.child == "openvino" else device()
        told = {name: value.to(where) for name, value in told.items()}
        y = call(torch.randn(2, 4, side, side).to(where), torch.tensor([500.0, 500.0]).to(where), **told)
    torch.save(y.cpu(), options.out)
    print(json.dumps(found))


# A model of that size -------------------------------------------------------------------------------


def prepare(folder: Path, xl: bool) -> None:
    """Write a pipeline of the real architecture with random weights."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    signs = [chr(i) for i in range(33, 127)]
    entries = {sign: i for i, sign in enumerate([*signs, *(f"{sign}</w>" for sign in signs)])}
    entries |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}

    def tokenizer(name: str) -> CLIPTokenizer:
        (folder / name).mkdir(parents=True)
        return CLIPTokenizer(vocab=entries, merges=[], pad_token="<|endoftext|>", model_max_length=77)

    def encoder(kind: Any, width: int, heads: int, layers: int) -> Any:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        ends = {"bos_token_id": 49406, "eos_token_id": 49407}
        return kind(CLIPTextConfig(**sizes, **ends, num_attention_heads=heads, projection_dim=width))

    attends, plain = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
    kinds = [plain, attends, attends] if xl else [attends, attends, attends, plain]
    added: dict[str, Any] = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "transformer_layers_per_block": [1, 2, 10],
        "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
    }  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=128 if xl else 64, block_out_channels=(320, 640, 1280) if xl else (320, 640, 1280, 1280),
        down_block_types=[kind[0] for kind in kinds], up_block_types=[kind[1] for kind in reversed(kinds)],
        cross_attention_dim=2048 if xl else 768, attention_head_dim=[5, 10, 20] if xl else 8, **(added if xl else {}),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if xl else 0.18215,
    )  # fmt: skip
    for network in (unet, vae):
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.7 * parameter[0].numel() ** -0.5)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    parts: dict[str, Any] = {"unet": unet, "vae": vae, "scheduler": scheduler, "tokenizer": tokenizer("tokenizer")}
    parts["text_encoder"] = encoder(CLIPTextModel, 768, 12, 12)
    if xl:
        parts |= {"tokenizer_2": tokenizer("tokenizer_2")}
        parts["text_encoder_2"] = encoder(CLIPTextModelWithProjection, 1280, 20, 32)
        diffusers.StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    else:
        none: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        diffusers.StableDiffusionPipeline(**parts, **none).save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2") if xl else ("tokenizer",):
        (folder / name / "vocab.json").write_text(json.dumps(entries))
        (folder / name / "merges.txt").write_text("#version: 0.2\n")


# All of them ----------------------------------------------------------------------------------------


def main() -> None:
    """Run all, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the model is, or is to be written")
    parser.add_argument("--xl", action="store_true", help="Stable Diffusion XL's architecture")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=None, help="pixels a side; 512, or 1024 of XL")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="which of them, with commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = options.size or (1024 if options.xl else 512)
    options.threads = options.threads or len(os.sched_getaffinity(0))
    if options.child:
        child(options)
        return
    if not (options.folder / "model_index.json").is_file():
        prepare(options.folder, options.xl)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in KNOWN]:
        parser.error(f"--only: there is no {unknown[0]!r} (known: {', '.join(KNOWN)})")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            runs[name].append(run(name, options))
            print(f"{name}: {json.dumps(runs[name][-1])}", file=sys.stderr)
    report(options, runs)


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in a process of its own, and return what it took."""
    command = [sys.executable, __file__, "--folder", options.folder, "--steps", options.steps, "--size", options.size]
    command += ["--threads", options.threads, "--child", name, "--out", answer(options, name)]
    command += ["--xl"] if options.xl else []
    began = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1][:200]}
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "process": time.perf_counter() - began}


def answer(options: argparse.Namespace, name: str) -> Path:
    """Return where a contestant writes its U-Net's output."""
    return options.folder.parent / f"{options.folder.name}-{name}.pt"


def report(options: argparse.Namespace, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table, write the JSON."""
    import torch
    from report import machine, table, versions

    wanted, rows, errors = answer(options, "reverie-exact"), [], {}
    for name, turns in runs.items():
        whole = [turn for turn in turns if "failed" not in turn]
        if not whole:
            rows.append([name, turns[0]["failed"], *[""] * 8])
            continue
        if wanted.is_file():
            mine, exact = torch.load(answer(options, name)), torch.load(wanted)
            errors[name] = float((mine - exact).norm() / exact.norm())
        median = {key: statistics.median(turn[key] for turn in whole) for key in ("import", "load", "decode", "peak")}
        first = statistics.median(turn["steps"][0] for turn in whole)
        later = [second for turn in whole for second in turn["steps"][1:]] or [first]
        picture = statistics.median(
            turn["import"] + turn["load"] + sum(turn["steps"]) + turn["decode"] for turn in whole
        )
        taken = statistics.median(turn["taken"] for turn in whole)
        numbers = [median["import"], median["load"], first, statistics.median(later), median["decode"], picture]
        memory = [f"{median['peak'] / 1e9:.2f}", f"{taken / 1e9:.2f}"]
        rows.append([name, *(f"{number:.1f}" for number in numbers), *memory, f"{errors.get(name, float('nan')):.1e}"])
    head = ["who", "import, s", "load, s", "first step, s", "a step, s", "decode, s", "cold to picture, s", "peak, GB"]
    print(table([*head, "taken, GB", "error of a step"], rows))
    if options.json:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"command": command, "machine": machine(), "versions": versions(PACKAGES)}
        options.json.write_text(json.dumps(about | {"runs": runs, "errors": errors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
