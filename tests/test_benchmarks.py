"""The command lines of the benchmarks, whose measuring needs devices that tests may lack."""

from __future__ import annotations

import importlib
import sys

import pytest

pytest.importorskip("benchmarks", reason="needs the benchmarks of a checkout")

from benchmarks import gpu, options
from benchmarks.cases import CPU, GPU
from benchmarks.peers import Peer

PRESENT = [Peer(name, lambda _: iter(()), ours=name in ("fused", "cublaslt")) for name in ("fused", "cublaslt", "FA3")]
PRESENT += [Peer(name, lambda _: iter(())) for name in ("cuDNN", "Pallas", "XLA gather")]


def contenders(*command_line: str) -> list[str]:
    return [peer.name for peer in gpu.contenders_of(gpu.make_parser().parse_args(command_line), PRESENT)]


MODULES = ["cpu", "docs_plots", "flash_mla", "gpu", "host", "ladder", "ports", "profile", "serve", "server", "sharded"]


@pytest.mark.parametrize("module", MODULES)
def test_help_shows_the_command(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as done:
        importlib.import_module(f"benchmarks.{module}").main()
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks.{module} ")


def test_commands_share_all_attention_workloads() -> None:
    parts = [gpu.ATTENTION[name] for name in ("decode", "prefill", "mla", "wide", "mixed")]
    assert sorted(w.name for part in parts for w in part) == sorted(w.name for w in GPU)
    assert all(parts)


def test_each_command_has_its_contenders() -> None:
    everyone = [peer.name for peer in PRESENT]
    assert contenders("decode") == contenders("all") == everyone
    assert contenders("decode", "--short") == ["fused", "FA3", "cuDNN"]
    assert contenders("sweep") == contenders("host") == ["fused", "FA3"]
    assert contenders("layers") == ["fused", "cublaslt", "FA3"]
    assert contenders("sweep", "--contenders", "cublaslt,Pallas") == ["cublaslt"]
    with pytest.raises(ValueError, match=r"^--contenders: expected names of fused, "):
        contenders("prefill", "--contenders", "FA4")


@pytest.mark.parametrize("command_line", [[], ["e"], ["writes", "--only", "e"], ["writes", "--short"], ["plot"]])
def test_wrong_command_lines_are_refused(command_line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.make_parser().parse_args(command_line)
    assert "usage: python -m benchmarks.gpu" in capsys.readouterr().err


def test_only_chooses_workloads_by_part_of_their_name(capsys: pytest.CaptureFixture[str]) -> None:
    parser = options.parser("cpu", "The CPU engine.")
    assert [w.name for w in options.chosen(parser, CPU, "prefill")] == ["prefill 1x2k bf16", "prefill 1x2k f32"]
    with pytest.raises(SystemExit):
        options.chosen(parser, CPU, "writes")
    assert "--only: expected part of one of" in capsys.readouterr().err
