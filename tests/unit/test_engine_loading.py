"""What a model must have to be served, and what the user is told when it has not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
)

from pdserve.contract.errors import ConfigError, ModelUnsupported, NotFound
from pdserve.contract.ids import BlockId
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import SequenceStep, StepBatch
from pdserve.engine import attention, checkpoint
from pdserve.engine.engine import ModelEngine
from pdserve.engine.settings import EngineSettings
from tests.engine_runs import generate, load_engine
from tests.reference import greedy_reference
from tests.small_models import make_model

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "falcon": (
        lambda: FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "do not go through AttentionInterface",
    ),
    "bloom": (lambda: BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4), "position_ids"),
    "mamba": (lambda: MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2), "linear_attention"),
    "deepseek_v3": (
        lambda: DeepseekV3Config(
            **SMALL,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            kv_lora_rank=16,
            q_lora_rank=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            qk_nope_head_dim=16,
            n_group=1,
            topk_group=1,
        ),
        "latent attention",
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def save(config: Any, folder: Path) -> Path:
    config._attn_implementation = "eager"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_cannot_be_served_exactly_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    make_config, need = UNSUPPORTED[kind]
    save(make_config(), tmp_path)
    with pytest.raises(ModelUnsupported, match=rf"\({kind}\) is not supported: it needs .*{need}"):
        load_engine(tmp_path)


def test_a_window_the_function_is_not_told_of_is_refused(tmp_path: Path) -> None:
    """The self-check finds what nothing announces: here a model whose masks are narrower than it says."""
    make_model("gemma2", tmp_path)

    def forget(*arguments: Any, **named: Any) -> Any:
        named.pop("sliding_window", None)
        return original(*arguments, **named)

    original = attention.paged_attention
    attention.AttentionInterface.register(attention.ATTENTION_NAME, forget)
    try:
        with pytest.raises(ModelUnsupported, match="logits differ from the model's own by"):
            load_engine(tmp_path)
    finally:
        attention.AttentionInterface.register(attention.ATTENTION_NAME, original)


def test_missing_models() -> None:
    with pytest.raises(NotFound, match="model folder /no/such/place does not exist: check the path"):
        ModelEngine.load(EngineSettings("/no/such/place"))


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **named: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    with pytest.raises(NotFound, match="neither a folder here nor in the local cache, and the hub cannot"):
        ModelEngine.load(EngineSettings("nobody/nothing"))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"has no config\.json"):
        load_engine(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "has no readable config.json (Expecting"), ("[1]", "has a config.json that holds no JSON object")],
)
def test_a_damaged_configuration(content: str, words: str, tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(NotFound) as caught:
        checkpoint.find_checkpoint(str(tmp_path), None)
    assert words in str(caught.value)
    assert str(caught.value).endswith("fetch it again")


@pytest.mark.parametrize(("kept", "words"), [(-1, "is cut short"), (100, "is damaged"), (0, "is damaged")])
def test_damaged_weights(kept: int, words: str, tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(NotFound, match=rf"model\.safetensors {words}.*: fetch it again"):
        checkpoint.find_checkpoint(str(tmp_path), None)


def test_a_missing_file_of_several(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.reference.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = checkpoint.find_checkpoint(str(tmp_path), None)
    assert whole.weight_bytes == sum(shard.stat().st_size for shard in shards)
    shards[-1].unlink()
    with pytest.raises(
        NotFound, match=rf"lacks {shards[-1].name}, which model\.safetensors\.index\.json names"
    ):
        checkpoint.find_checkpoint(str(tmp_path), None)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(NotFound, match=r"is damaged .*has no weight_map"):
        checkpoint.find_checkpoint(str(tmp_path), None)


def test_weights_are_as_large_as_the_dtype_they_are_loaded_as(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, dtype=torch.bfloat16)
    num_weights = sum(parameter.numel() for parameter in model.reference.parameters())
    found = checkpoint.find_checkpoint(str(tmp_path), None)
    assert found.loaded_bytes("auto") == found.loaded_bytes("bfloat16") == 2 * num_weights
    assert found.loaded_bytes("float16") == 2 * num_weights
    assert found.loaded_bytes("float32") == 4 * num_weights


def test_weights_in_two_forms_are_counted_once(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    (tmp_path / "consolidated.safetensors").write_bytes(file.read_bytes())
    assert checkpoint.find_checkpoint(str(tmp_path), None).weight_bytes == file.stat().st_size


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ModelUnsupported, match=r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"
    ):
        load_engine(tmp_path)


def test_quantised_and_unknown_models(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    file = tmp_path / "config.json"
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ModelUnsupported, match=r"is quantised \(awq\)"):
        load_engine(tmp_path)
    file.write_text(json.dumps(plain | {"model_type": "llama9"}))
    with pytest.raises(ModelUnsupported, match="'llama9', which the installed transformers does not know"):
        load_engine(tmp_path)
    custom = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    file.write_text(json.dumps(plain | custom))
    with pytest.raises(ModelUnsupported, match="brings its own Python code: set trust_remote_code"):
        load_engine(tmp_path)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rope_that_depends_on_the_batch_is_served_up_to_where_it_does_not(kind: str, tmp_path: Path) -> None:
    if kind == "longrope":
        rope = {
            "rope_type": kind,
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 64,
        }
        config = Phi3Config(
            **SMALL, max_position_embeddings=256, original_max_position_embeddings=64, rope_parameters=rope
        )
    else:
        rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
        config = LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=rope)
    save(config, tmp_path)
    engine = load_engine(tmp_path, dtype="float32")
    assert engine.info.max_model_len == 64
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    reference.generation_config.eos_token_id = None
    prompts = [list(range(1, 8)), list(range(1, 50))]
    expected = [greedy_reference(reference, prompt, 8) for prompt in prompts]
    assert generate(engine, prompts, 8) == expected
    with pytest.raises(ModelUnsupported, match="give at most 64"):
        load_engine(tmp_path, max_model_len=65)


def test_what_is_known_of_a_model(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    told: list[str] = []
    settings = EngineSettings(
        str(tmp_path), served_name="mine", threads=1, kv_memory_bytes=1 << 20, chunk_tokens=64
    )
    engine = ModelEngine.load(settings, told.append)
    info = engine.info
    assert (info.name, info.architecture, info.dtype) == ("mine", "LlamaForCausalLM", "float32")
    assert (info.num_layers, info.num_kv_heads, info.head_dim, info.block_size) == (3, 2, 16, 16)
    assert info.block_bytes == 3 * 2 * 16 * 2 * 16 * 4 == engine.blocks.block_bytes
    assert info.num_blocks == (1 << 20) // info.block_bytes == engine.blocks.num_blocks
    assert (info.max_model_len, info.chunk_tokens) == (512, 64)
    assert engine.cost.predict_s(100, 0) > engine.cost.predict_s(10, 0) > 0
    assert [line.split()[0] for line in told] == [
        "finding",
        "loading",
        "laying",
        "checking",
        "measuring",
    ]


def test_the_fingerprint_names_what_a_kv_byte_means(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "a", seed=1)
    make_model("llama", tmp_path / "same", seed=1)
    make_model("llama", tmp_path / "other", seed=2)
    first = load_engine(tmp_path / "a").info.fingerprint
    assert load_engine(tmp_path / "same", kv_memory_bytes=2 << 20).info.fingerprint == first
    different = [
        load_engine(tmp_path / "other"),
        load_engine(tmp_path / "a", dtype="bfloat16"),
        load_engine(tmp_path / "a", block_size=8),
    ]
    assert len({first, *(engine.info.fingerprint for engine in different)}) == 4


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", ""),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("threads", 0),
        ("block_size", 0),
        ("kv_memory_bytes", 0),
        ("kv_memory_fraction", 1.5),
        ("max_model_len", 1),
        ("chunk_tokens", 100),
    ],
)
def test_a_bad_setting_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"engine setting {key} is not valid") as caught:
        EngineSettings(**({"model": "m"} | {key: value}))  # type: ignore[arg-type]
    assert caught.value.info.param == key


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch finds no GPU: set device to auto or cpu"):
        load_engine(tmp_path, device="cuda")


def test_malformed_batches_are_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    engine = load_engine(tmp_path)
    with pytest.raises(ValueError, match="at least one token"):
        engine.step(StepBatch([SequenceStep(b"", 0, [BlockId(0)])]))
    with pytest.raises(ValueError, match="1 blocks of 16 tokens do not cover the 17 tokens"):
        engine.step(StepBatch([SequenceStep(pack_tokens([1] * 2), 15, [BlockId(0)])]))
