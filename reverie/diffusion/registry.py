"""What there is, by name; each entry is imported when it is asked for. A new one is one file and one line here."""

from reverie.base.registry import Registry

_HERE = "reverie.diffusion"

schedules = Registry(
    "schedule",
    {
        "linear": f"{_HERE}.schedules:linear",
        "scaled-linear": f"{_HERE}.schedules:scaled_linear",
        "cosine": f"{_HERE}.schedules:cosine",
        "sigmoid": f"{_HERE}.schedules:sigmoid",
        "sigmoid-in-beta": f"{_HERE}.schedules:sigmoid_beta",
        "cosine-continuous": f"{_HERE}.schedules:Cosine",
        "vp": f"{_HERE}.schedules:VP",
        "sub-vp": f"{_HERE}.schedules:SubVP",
        "ve": f"{_HERE}.schedules:VE",
        "edm": f"{_HERE}.schedules:EDM",
        "flow": f"{_HERE}.schedules:Flow",
    },
)

predictions = Registry(
    "prediction",
    {
        "eps": f"{_HERE}.predictions:Eps",
        "x0": f"{_HERE}.predictions:X0",
        "v": f"{_HERE}.predictions:V",
        "score": f"{_HERE}.predictions:Score",
        "velocity": f"{_HERE}.predictions:Velocity",
        "edm": f"{_HERE}.predictions:EDMOutput",
    },
)

grids = Registry(
    "grid",
    {
        "leading": f"{_HERE}.grids:leading",
        "trailing": f"{_HERE}.grids:trailing",
        "linspace": f"{_HERE}.grids:linspace",
        "karras": f"{_HERE}.grids:karras",
        "log-snr": f"{_HERE}.grids:uniform_log_snr",
        "angle": f"{_HERE}.grids:angle",
    },
)

samplers = Registry(
    "sampler",
    {
        "ddpm": f"{_HERE}.samplers.ancestral:DDPM",
        "ddim": f"{_HERE}.samplers.ddim:DDIM",
        "dpmpp-2m": f"{_HERE}.samplers.dpmpp:DPMpp2M",
        "dpmpp-2m-sde": f"{_HERE}.samplers.dpmpp:DPMpp2MSDE",
        "dpmpp-3m": f"{_HERE}.samplers.dpmpp:DPMpp3M",
        "dpmpp-3m-sde": f"{_HERE}.samplers.dpmpp:DPMpp3MSDE",
        "dpmpp-2s": f"{_HERE}.samplers.dpmpp:DPMpp2S",
        "dpmpp-3s": f"{_HERE}.samplers.dpmpp:DPMpp3S",
        "unipc": f"{_HERE}.samplers.unipc:UniPC",
        "deis": f"{_HERE}.samplers.adams:DEIS",
        "lms": f"{_HERE}.samplers.adams:LMS",
        "pndm": f"{_HERE}.samplers.adams:PNDM",
        "euler": f"{_HERE}.samplers.runge_kutta:Euler",
        "heun": f"{_HERE}.samplers.runge_kutta:Heun",
        "edm": f"{_HERE}.samplers.runge_kutta:EDMHeun",
        "dpm2": f"{_HERE}.samplers.runge_kutta:DPM2",
        "euler-ancestral": f"{_HERE}.samplers.runge_kutta:EulerAncestral",
        "dpm2-ancestral": f"{_HERE}.samplers.runge_kutta:DPM2Ancestral",
        "adaptive": f"{_HERE}.samplers.adaptive:Adaptive",
        "restart": f"{_HERE}.samplers.restart:Restart",
        "langevin": f"{_HERE}.samplers.langevin:AnnealedLangevin",
        "euler-maruyama": f"{_HERE}.samplers.langevin:EulerMaruyama",
        "predictor-corrector": f"{_HERE}.samplers.langevin:PredictorCorrector",
        "consistency": f"{_HERE}.samplers.consistency:Consistency",
        "mean-flow": f"{_HERE}.samplers.consistency:MeanFlow",
    },
)

weights = Registry(
    "loss weight",
    {
        "uniform": f"{_HERE}.weights:Uniform",
        "min-snr": f"{_HERE}.weights:MinSNR",
        "p2": f"{_HERE}.weights:P2",
        "edm": f"{_HERE}.weights:EDMWeight",
    },
)
