"""An HTTP server with OpenAI's interface around the engine. Needs the extra `serve`.

    serve(engine, tokenizer, model_name="mine", port=8000)

One file per concern: `_app` (paths), `_access` (keys and bodies), `_forms` (what clients ask for), `_chat` (templates),
`_thread` (the engine's), `_answer` and `_choices` (what clients get), `_metrics`, `_errors`, and `_run` (uvicorn).
"""

from jax_paged_attn.serving.server._app import create_app
from jax_paged_attn.serving.server._chat import ChatTemplate
from jax_paged_attn.serving.server._run import serve

__all__ = ["ChatTemplate", "create_app", "serve"]
