"""The command that says which attention backends run here."""

import argparse

import torch

from ..dit import describe_backends
from ..memory import OneAtATime


def add_attention(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    attention = commands.add_parser("attention", help="say which attention backends run here, and why others do not")
    attention.set_defaults(run=_backends)
    attention.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the accelerator, if there is one)")
    attention.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")


def _backends(options: argparse.Namespace) -> str:
    device = OneAtATime(options.device).device
    found = describe_backends(device, getattr(torch, options.dtype))
    return "\n".join(f"{name:<16} {f'no: {reason}' if reason else 'yes'}" for name, reason in found.items())
