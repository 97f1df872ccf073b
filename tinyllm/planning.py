"""The plan of one section of params.yaml, for the command line."""

from dataclasses import dataclass

from tinyllm import paths
from tinyllm.errors import ParamsError
from tinyllm.finetune.replay import ChatTrainingParams
from tinyllm.model.directory import TOKENIZER
from tinyllm.model.sizes import ModelParams, resolve
from tinyllm.params import build_params, load_params, read_yaml
from tinyllm.tokenizer.tokenizer import Tokenizer
from tinyllm.training.params import PretrainParams, TrainingParams
from tinyllm.training.plan import describe, make_plan, measure_step_s
from tinyllm.training.precision import choose_device, use_threads

SECTIONS: dict[str, type[TrainingParams]] = {"pretrain": PretrainParams, "sft": ChatTrainingParams}
MEASURE_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """The section that gives the sizes."""

    model: ModelParams


def plan_section(section: str, *, measure: bool) -> list[str]:
    """Return the plan of a training section as lines.

    Args:
        section: of params.yaml.
        measure: time steps for ten seconds.

    Raises:
        ParamsError: no such section, or params.yaml is not valid.
    """
    if section not in SECTIONS:
        raise ParamsError(
            f"{section}: no section that can be planned; one of {', '.join(SECTIONS)}"
        )
    knobs = build_params(SECTIONS[section], read_yaml(paths.PARAMS)[section], str(paths.PARAMS))
    config = resolve(load_params(_Model, paths.PARAMS).model, _vocab_size())
    use_threads()
    device = choose_device()
    step_s = measure_step_s(config, knobs, device, MEASURE_S) if measure else None
    heading = f"{section} on {device}, vocabulary {config.vocab_size}, {knobs.precision}"
    return [heading, *describe(make_plan(config, knobs, device), knobs, step_s)]


def _vocab_size() -> int:
    """Return that of the tokenizer if it is made already, else the one that is asked for."""
    if (paths.TOKENIZER / TOKENIZER).is_file():
        return Tokenizer.load(paths.TOKENIZER).vocab_size
    document = read_yaml(paths.PARAMS)
    wanted = document["prune"]["vocab_size"] or document["tokenizer"]["vocab_size"]
    return int(wanted)
