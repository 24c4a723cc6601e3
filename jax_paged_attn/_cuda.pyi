"""
The CUDA engines of jax_paged_attn: XLA FFI handlers and facts about the build.
"""



def registrations() -> dict[str, object | dict[str, object]]:
    """
    Handlers, or those of each stage, by the name of their FFI target, for platform "CUDA".
    """

def state_types() -> dict[str, dict[str, object]]:
    """Registrations of the types of state, by name."""

def targets() -> dict[str, dict[str, list[str]]]:
    """
    Names of the `operands`, `results` and `attributes` of each FFI target, in order.
    """

def attention_plan(q_dtype: str, kv_dtype: str, num_rows: int, num_q_heads: int, num_kv_heads: int, head_dim: int, value_dim: int, page_size: int, num_seqs: int, max_pages: int, decode: bool, workspace_limit: int, layout: str = 'split', num_padding_heads: int = 0, token_scales: bool = False) -> dict[str, int]:
    """
    How "cublaslt" would run a call of these sizes: `workspace_bytes`, `launches`, and sizes of its parts.
    """

def workspace_bound(q_dtype: str, kv_dtype: str, num_q_heads: int, num_kv_heads: int, head_dim: int, value_dim: int, page_size: int, workspace_limit: int, layout: str = 'split', num_padding_heads: int = 0, token_scales: bool = False) -> int:
    """
    At least the workspace of any such call, less WORKSPACE_BYTES_PER_ROW for each row and sequence.
    """

def fused_workspace_bytes(q_dtype: str, kv_dtype: str, num_rows: int, num_q_heads: int, num_kv_heads: int, head_dim: int, value_dim: int, page_size: int, num_seqs: int, max_pages: int, decode: bool, batch_invariant: bool, workspace_limit: int, cumulative: bool = False) -> int:
    """Bytes of scratch memory that "fused" needs for a call of these sizes."""

def fused_workspace_bound(q_dtype: str, kv_dtype: str, num_q_heads: int, num_kv_heads: int, head_dim: int, value_dim: int, page_size: int, decode: bool, batch_invariant: bool, workspace_limit: int, cumulative: bool = False) -> int:
    """At least those of any such call, less what each row and sequence adds."""

def fused_workspace_bytes_per_row(num_q_heads: int, value_dim: int) -> int:
    """At most what a query row of a batch-invariant call adds to them."""

FUSED_CUMULATIVE_BYTES_PER_SEQUENCE: int = 4

FUSED_WORKSPACE_BYTES_PER_SEQUENCE: int = 24

WORKSPACE_BYTES_PER_ROW: int = 32

DEFAULT_WORKSPACE_LIMIT: int = 268435456

def set_library_directory(directory: str) -> None:
    """
    Where to look for cuBLASLt if neither the process nor the loader's search path has it.
    """

def host_calls() -> int:
    """
    How often XLA has called the attention handler in this process; replays of a CUDA graph do not.
    """

def build_info() -> dict[str, str]:
    """
    The compiler, the version of the CUDA runtime, the compute capabilities that kernels were compiled for, and the version of the XLA FFI headers.
    """
