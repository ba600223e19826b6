"""Text models come from checkpoints of transformers as well as from pipelines' folders."""

import json

import pytest
import torch
import transformers
from tiny_llada import build_tiny_llada, tokenizer
from tiny_text import qwen3

from accel.errors import AccelError
from accel.pipelines.dllm import MaskedDiffusionPipeline
from accel.pipelines.host import Host
from accel.pipelines.model_settings import model_config
from accel.pipelines.text_checkpoint import is_pipeline

REMOTE = """
from transformers import EuroBertForMaskedLM

class RemoteModel(EuroBertForMaskedLM):
    pass
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same weights as a pipeline, as a checkpoint, and as one with code of its own."""
    root = tmp_path_factory.mktemp("text")
    build_tiny_llada(root / "pipeline")
    pipe = MaskedDiffusionPipeline.from_pretrained(root / "pipeline")
    for name in ("alone", "remote"):
        pipe.model.save_pretrained(root / name)
        pipe.tokenizer.save_pretrained(root / name)
    (root / "remote" / "remote.py").write_text(REMOTE)
    path = root / "remote" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoModel": "remote.RemoteModel"}
    config["architectures"] = ["RemoteModel"]
    path.write_text(json.dumps(config))
    return root, pipe("abc", gen_length=8).sequences


@pytest.mark.parametrize(
    ("name", "load", "model"),
    [
        ("pipeline", {}, "EuroBertForMaskedLM"),
        ("alone", {}, "EuroBertForMaskedLM"),
        ("remote", {"trust_remote_code": True}, "RemoteModel"),
    ],
)
def test_the_same_model_by_every_way(folders, name, load, model):
    root, expected = folders
    assert is_pipeline(root / name) is (name == "pipeline")
    pipe = MaskedDiffusionPipeline.from_pretrained(root / name, dtype=torch.float32, **load)
    assert type(pipe.model).__name__ == model
    assert not pipe.model.training
    assert torch.equal(pipe("abc", gen_length=8).sequences, expected)


def test_a_causal_class_and_the_arguments_of_the_pipeline(tmp_path):
    qwen3().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    pipe = MaskedDiffusionPipeline.from_pretrained(
        tmp_path, dtype=torch.bfloat16, shift_logits=True, mask_token_id=7
    )
    assert isinstance(pipe.model, transformers.Qwen3ForCausalLM)
    assert pipe.model.dtype == torch.bfloat16
    assert (pipe.config.shift_logits, pipe.mask_id) == (True, 7)


def test_commands_load_it_too(folders):
    config = {
        "name": "mine",
        "pipeline": "accel.pipelines.dllm.MaskedDiffusionPipeline",
        "path": str(folders[0] / "alone"),
        "output": "text",
        "call": {"gen_length": 8},
        "prompts": ["abc"],
        "load": {"mask_token_id": 3},
    }
    host = Host(model_config(config))
    assert host.generate("abc", 0).tokens.tolist() == folders[1][0].tolist()


def test_what_names_no_class(tmp_path):
    qwen3().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(AccelError, match="names no class of transformers, but"):
        MaskedDiffusionPipeline.from_pretrained(tmp_path)
