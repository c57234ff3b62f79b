"""LoRA files of other tools at the right strength, and conversion into theirs.

The files are written by the tools' own functions where those are libraries (diffusers, PEFT), else by the published
key format. All hold the same LoRA: rank 4, trained at alpha 2, with some layers of rank 2 and alpha 4 in places.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cogcache import cli
from cogcache.errors import CogcacheError, ConfigError, LoraError
from cogcache.lora import Provenance, read_lora_header, save_lora
from cogcache.lora.convert import convert_lora
from cogcache.lora.foreign import canonical_name
from cogcache.lora.weights import lora_settings, read_lora
from cogcache.tiny import Family
from cogcache.variants import read_variant

Models = Callable[[Family], Path]
PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "to_out.0", "ff.net.0.proj"]}
QUIET = pytest.mark.filterwarnings("ignore:.*invalid shape:peft.utils.warning.PeftWarning")  # of lora_bias
MIXED = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_q": 4}}


class Bench:
    """A tiny transformer that LoRAs are tried on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.variant = read_variant(root)
        generator = torch.Generator().manual_seed(2)
        self.hidden = torch.randn((1, 2, 16, 8, 12), generator=generator)
        self.text = torch.randn((1, self.variant.text_length, self.variant.text_dim), generator=generator)

    def bare(self) -> CogVideoXTransformer3DModel:
        return CogVideoXTransformer3DModel.from_pretrained(self.root, subfolder="transformer")

    def trained(self, **options: Any) -> tuple[CogVideoXTransformer3DModel, LoraConfig]:
        """A transformer with the LoRA as PEFT gives it after training."""
        model, config = self.bare(), LoraConfig(**{**PLAIN, **options})
        model.add_adapter(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                if "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
        return model, config

    def output(self, model: Any) -> torch.Tensor:
        with torch.no_grad():
            sample: torch.Tensor = model(self.hidden, self.text, torch.tensor([500])).sample
        return sample

    def stock(self, path: Path) -> torch.Tensor:
        """Output with the LoRA as stock ``load_lora_weights`` loads the file."""
        pipe = CogVideoXPipeline.from_pretrained(
            self.root, transformer=self.bare(), vae=None, text_encoder=None
        )
        pipe.load_lora_weights(path)
        return self.output(pipe.transformer.eval())

    def mine(self, path: Path, alpha: float | None = None) -> torch.Tensor:
        """Output with the LoRA as this project reads it, given to diffusers as ``infer`` does."""
        lora, model = read_lora(read_lora_header(path), alpha), self.bare()
        CogVideoXPipeline.load_lora_into_transformer(
            {f"transformer.{name}": tensor for name, tensor in lora.tensors.items()},
            model,
            metadata={f"transformer.{name}": value for name, value in lora.settings.items()},
        )
        return self.output(model.eval())


@pytest.fixture(scope="module")
def bench(tiny_models: Models) -> Bench:
    return Bench(tiny_models("2b"))


def own(folder: Path, model: Any, config: LoraConfig) -> Path:
    state = get_peft_model_state_dict(model)
    return save_lora(
        folder / "own.safetensors",
        state,
        lora_config=config.to_dict(),
        provenance=Provenance(base_model="some/base"),
    )


def reference(folder: Path, model: Any, _config: LoraConfig) -> Path:
    """The CogVideo reference trainer and diffusers' example: both call this with nothing else."""
    CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(model))
    return folder / "pytorch_lora_weights.safetensors"


def diffusers(folder: Path, model: Any, config: LoraConfig) -> Path:
    CogVideoXPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    return folder  # a folder will do


def finetrainers(folder: Path, model: Any, config: LoraConfig) -> Path:
    """finetrainers' ``_save_lora_weights``: a ``lora_config`` text in the metadata."""
    known = {"r": config.r, "lora_alpha": config.lora_alpha, "init_lora_weights": True}
    known |= {"target_modules": sorted(config.target_modules), "alpha_pattern": config.alpha_pattern}
    tensors = {f"transformer.{name}": t.contiguous() for name, t in get_peft_model_state_dict(model).items()}
    path = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "lora_config": json.dumps(known, indent=4)})
    return path


def peft_folder(folder: Path, model: Any, config: LoraConfig) -> Path:
    wrapped = get_peft_model(CogVideoXTransformer3DModel.from_config(model.config), config)
    state = {f"base_model.model.{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}
    wrapped.save_pretrained(folder, state_dict=state)
    if config.use_dora:  # PEFT filters what it is given by its own names
        assert any("magnitude" in name for name in load_file(folder / "adapter_model.safetensors"))
    return folder


def with_alphas(name: Callable[[str], str]) -> Callable[[Path, Any, LoraConfig], Path]:
    """Files with lora_down, lora_up and an alpha tensor for every layer, which ``name`` spells."""

    def write(folder: Path, model: Any, config: LoraConfig) -> Path:
        tensors = {}
        for key, tensor in get_peft_model_state_dict(model).items():
            layer, part = key.split(".lora_")
            part = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
            tensors[f"{name(layer)}.{part}"] = tensor.contiguous()
            alpha = config.alpha_pattern.get("to_q") if layer.endswith("to_q") else None
            tensors[f"{name(layer)}.alpha"] = torch.tensor(float(alpha or config.lora_alpha))
        save_file(tensors, folder / "alphas.safetensors")
        return folder / "alphas.safetensors"

    return write


kohya = with_alphas(lambda layer: "lora_unet__" + layer.replace(".", "_"))
dotted = with_alphas(lambda layer: "diffusion_model." + layer)


@pytest.mark.parametrize("options", [{}, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("write", [own, diffusers, finetrainers, peft_folder, kohya, dotted])
def test_files_that_say_their_alpha_load_at_the_trained_strength(
    bench: Bench, tmp_path: Path, write: Callable[..., Path], options: dict[str, Any]
) -> None:
    model, config = bench.trained(**options)
    path = write(tmp_path, model, config)
    assert read_lora_header(path).alpha is not None
    assert torch.equal(bench.mine(path), bench.output(model.eval()))


@QUIET
@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("write", [own, diffusers, peft_folder])
def test_other_kinds_of_lora(
    bench: Bench, tmp_path: Path, write: Callable[..., Path], options: dict[str, Any]
) -> None:
    model, config = bench.trained(**options)
    assert torch.equal(bench.mine(write(tmp_path, model, config)), bench.output(model.eval()))


def test_reference_files_need_their_alpha_said(bench: Bench, tmp_path: Path) -> None:
    """Without it alpha = rank, twice the strength of this LoRA, as stock diffusers applies it."""
    model, config = bench.trained()
    path = reference(tmp_path, model, config)
    assert read_lora_header(path).alpha is None
    trained = bench.output(model.eval())
    assert torch.equal(bench.mine(path, alpha=2), trained)
    assert torch.equal(bench.mine(path), bench.stock(path))
    assert not torch.allclose(bench.mine(path), trained, atol=1e-2)


def test_mixed_ranks_without_alpha_get_alpha_equal_rank_each(bench: Bench, tmp_path: Path) -> None:
    model, config = bench.trained(rank_pattern={"to_q": 2})
    path = reference(tmp_path, model, config)
    assert torch.equal(bench.mine(path), bench.stock(path))
    same = bench.trained(rank_pattern={"to_q": 2}, lora_alpha=4, alpha_pattern={"to_q": 2})[0]
    assert torch.equal(bench.mine(path), bench.output(same.eval()))


def test_stock_diffusers_does_not_look_at_finetrainers_alpha(bench: Bench, tmp_path: Path) -> None:
    """Why ``convert-lora`` is worth a command: the same file is twice as strong in stock diffusers."""
    model, config = bench.trained()
    path = finetrainers(tmp_path, model, config)
    assert not torch.allclose(bench.stock(path), bench.mine(path), atol=1e-2)
    converted = convert_lora(path, tmp_path / "converted.safetensors", "diffusers")
    assert torch.equal(bench.stock(converted), bench.output(model.eval()))


@QUIET
@pytest.mark.parametrize(
    "options", [{}, MIXED, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}]
)
@pytest.mark.parametrize("strip", [True, False], ids=["no metadata", "metadata"])
def test_folded_files_are_right_for_tools_that_take_alpha_as_rank(
    bench: Bench, tmp_path: Path, options: dict[str, Any], strip: bool
) -> None:
    model, config = bench.trained(**options)
    path = convert_lora(own(tmp_path, model, config), tmp_path / "folded.safetensors", "folded")
    assert read_lora_header(path).base_model == "some/base"
    if strip:
        save_file(load_file(path), path)
        assert read_lora_header(path).alpha is None
    trained = bench.output(model.eval())
    assert torch.allclose(bench.stock(path), trained, atol=1e-4)
    if not options:  # a strength of 1/2 rounds nothing
        assert torch.equal(bench.stock(path), trained)


@pytest.mark.parametrize("options", [{}, MIXED, {"use_rslora": True}, {"use_dora": True}])
def test_converted_folders_load_in_peft(bench: Bench, tmp_path: Path, options: dict[str, Any]) -> None:
    model, config = bench.trained(**options)
    folder = convert_lora(own(tmp_path, model, config), tmp_path / "peft", "peft")
    loaded = PeftModel.from_pretrained(bench.bare(), folder)
    assert torch.equal(bench.output(loaded.eval()), bench.output(model.eval()))
    assert torch.equal(bench.mine(folder), bench.output(model.eval()))


def test_fuse_and_unfuse(bench: Bench, tmp_path: Path) -> None:
    """Fused is the LoRA applied, unfused is the base again, both within rounding."""
    model, config = bench.trained()
    pipe = CogVideoXPipeline.from_pretrained(
        bench.root, transformer=bench.bare(), vae=None, text_encoder=None
    )
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(own(tmp_path, model, config))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = pipe.transformer.state_dict()
    assert torch.allclose(bench.output(pipe.transformer.eval()), bench.output(model.eval()), atol=1e-4)
    changed = [name for name in before if not torch.allclose(before[name], fused[name], atol=1e-3)]
    assert len(changed) == 3 * bench.variant.num_layers

    pipe.transformer = bench.bare()
    pipe.load_lora_weights(own(tmp_path, model, config))
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_settings_name_layers_ranks_and_alphas_of_the_tensors(bench: Bench, tmp_path: Path) -> None:
    model, config = bench.trained(**MIXED)
    settings = lora_settings(read_lora_header(kohya(tmp_path, model, config)))
    assert (settings["r"], settings["lora_alpha"], len(settings["target_modules"])) == (4, 2.0, 6)
    assert set(settings["rank_pattern"].values()) == {2}
    assert set(settings["alpha_pattern"].values()) == {4.0}


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("transformer.proj_out.lora_A.weight", "proj_out.lora_A.weight"),
        ("base_model.model.patch_embed.text_proj.lora_B.default.weight", "patch_embed.text_proj.lora_B.weight"),
        ("transformer_blocks.0.attn1.to_q.lora_down.weight", "transformer_blocks.0.attn1.to_q.lora_A.weight"),
        ("lora_transformer_transformer_blocks_11_ff_net_0_proj.alpha", "transformer_blocks.11.ff.net.0.proj.alpha"),
        ("lora_unet__transformer_blocks_0_attn1_to_out_0.lora_up.weight",
         "transformer_blocks.0.attn1.to_out.0.lora_B.weight"),
        ("text_encoder.x.lora_A.weight", None),
        ("lora_te_text_model_x.lora_down.weight", None),
        ("transformer.x.dora_scale", None),
        ("transformer.x.lokr_w1", None),
        ("transformer.x.weight", None),
    ],
)  # fmt: skip
def test_names(name: str, canonical: str | None) -> None:
    assert canonical_name(name) == canonical


def broken(change: str) -> Callable[[Path, Any, LoraConfig], Path]:
    def write(folder: Path, model: Any, config: LoraConfig) -> Path:
        path = (peft_folder if change.startswith("config") else kohya)(folder, model, config)
        if change.startswith("config"):
            text = {"config text": "{", "config kind": '{"peft_type": "LOKR", "r": 1}', "config none": "[]"}
            (folder / "adapter_config.json").write_text(text[change])
            return path
        tensors = load_file(path)
        first = sorted(name for name in tensors if name.endswith("lora_down.weight"))[0]
        if change == "no lora_B":
            del tensors[first.replace("down", "up")]
        elif change == "one alpha missing":
            del tensors[first.replace("lora_down.weight", "alpha")]
        elif change == "alpha not a number":
            tensors[first.replace("lora_down.weight", "alpha")] = torch.tensor(float("nan"))
        elif change == "twice":
            tensors["transformer." + (canonical_name(first) or "")] = tensors[first].clone()
        save_file(tensors, path)
        return path

    return write


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("no lora_B", "has no lora_B"),
        ("one alpha missing", "says alpha for some layers, but not for"),
        ("alpha not a number", "not a number"),
        ("twice", "twice"),
        ("config text", "damaged adapter metadata"),
        ("config kind", "LOKR adapter, not a LoRA"),
        ("config none", "damaged adapter metadata"),
    ],
)
def test_damaged_foreign_files(bench: Bench, tmp_path: Path, change: str, text: str) -> None:
    with pytest.raises(LoraError, match=text):
        read_lora_header(broken(change)(tmp_path, *bench.trained()))


def test_alpha_is_only_taken_where_it_is_unknown(bench: Bench, tmp_path: Path) -> None:
    path = own(tmp_path, *bench.trained())
    with pytest.raises(ConfigError, match=r"says its alpha \(2\).*--lora-scale"):
        read_lora(read_lora_header(path), alpha=4)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"no LoRA file .*pytorch_lora_weights\.safetensors"):
        read_lora_header(tmp_path)


@pytest.fixture
def converting(bench: Bench, tmp_path: Path) -> Callable[..., int]:
    """Runs ``cogcache convert-lora`` on a file of the reference trainer."""
    source = reference(tmp_path, *bench.trained())
    return lambda out, *flags: cli.run(["convert-lora", str(source), str(tmp_path / out), *flags])


def test_the_command(
    bench: Bench, converting: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert converting("out.safetensors", "--lora-alpha", "2") == 0
    assert "(folded)" in capsys.readouterr().out
    assert torch.equal(bench.stock(tmp_path / "out.safetensors"), bench.output(bench.trained()[0].eval()))
    before = (tmp_path / "out.safetensors").read_bytes()
    assert converting("out.safetensors") == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_bytes() == before
    assert converting("out2") == 2
    assert "is a .safetensors file" in capsys.readouterr().err
    assert converting("out2.safetensors", "--format", "peft") == 2
    assert "is a folder" in capsys.readouterr().err


def test_the_command_warns_of_an_assumed_alpha(
    converting: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    assert converting("out", "--format", "peft") == 0
    assert "alpha = rank = 4 is taken" in caplog.text


def test_errors_are_of_the_projects_kind() -> None:
    with pytest.raises(CogcacheError):
        convert_lora(Path("nowhere.safetensors"), Path("out.safetensors"), "folded")
