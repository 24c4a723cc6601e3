"""
The CPU engine of jax_paged_attn: XLA FFI handlers and facts about the build.
"""



def registrations() -> dict[str, object]:
    """Handlers by the name of their FFI target, for platform "cpu"."""

def targets() -> dict[str, dict[str, list[str]]]:
    """
    Names of the `operands`, `results` and `attributes` of each FFI target, in order.
    """

def attention_workspace_bytes(num_seqs: int, num_q_heads: int, value_dim: int) -> int:
    """Size of the workspace result of the attention target."""

def isa() -> str:
    """
    Instruction set in use: the best available, or JPA_CPU_ISA. RuntimeError if that one is not available.
    """

def available_isas() -> list[str]:
    """Instruction sets that this machine can run, fastest first."""

def build_info() -> dict[str, str]:
    """The compiler, and the version of the XLA FFI headers."""
