# SPDX-License-Identifier: Apache-2.0
"""
Serve a pipeline with Ray Serve: requests of several users that come at the same time are drawn in one call, and each
image is the one that a call of its own would draw. `python examples/serve_ray.py --model FOLDER_OR_REPOSITORY`, then

    curl "http://localhost:8000/?prompt=3&seed=0" --output image.png
"""

import asyncio
import io
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser

import PIL.Image
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from hf_var import DIGITS_CHECKPOINT, VARTextToImagePipeline
from hf_var.pipelines.base import load_pipeline
from hf_var.pipelines.conditions import knows_unconditional


# Images of a call, at most.
BATCH_SIZE = 16
# How long a request waits for others. While a batch is drawn, the next one gathers.
WAIT_S = 0.02


@serve.deployment(max_ongoing_requests=4 * BATCH_SIZE)
class Images:
    """A pipeline of classes or texts: `await images.draw.remote("3", seed)` or, by HTTP, `/?prompt=3&seed=0`."""

    def __init__(self, model: str, device: str | None = None):
        # In half precision the size of a batch would change single codes.
        self.pipe = load_pipeline(model, dtype=torch.float32).to(
            device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        self.pipe.set_progress_bar_config(disable=True)
        has_tokenizer = getattr(self.pipe, "tokenizer", None) is not None
        self.reads_texts = isinstance(self.pipe, VARTextToImagePipeline) or has_tokenizer
        self.knows_unconditional = all(knows_unconditional(prior.config) for prior in self.pipe.priors)
        self.batch_sizes: list[int] = []

    async def draw(self, prompt: str, seed: int = 0) -> PIL.Image.Image:
        """An image of a prompt. It depends on the prompt and the seed alone, not on its batch."""
        # Checked before the batch, so that the mistake of one user does not stop the call of all.
        if not 0 <= seed < 2**63:
            raise ValueError(f"`seed` must be from 0 to 2**63 - 1, got {seed}.")
        if not self.reads_texts:
            self.pipe.get_label_ids(prompt or None)
            if not prompt and not self.knows_unconditional:
                raise ValueError("`prompt` must be a class: the model was trained without class dropout.")
        return await self.draw_batch((prompt, seed))

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=WAIT_S)
    async def draw_batch(self, requests: list[tuple[str, int]]) -> list[PIL.Image.Image]:
        self.batch_sizes.append(len(requests))
        prompts = [prompt for prompt, _ in requests]
        # On the CPU, where torch draws the same numbers whatever the device of the model.
        generators = [torch.Generator().manual_seed(seed) for _, seed in requests]
        # In a thread, so that requests are accepted meanwhile.
        output = await asyncio.to_thread(self.pipe, prompt=prompts, generator=generators)
        return output.images

    async def get_batch_sizes(self) -> list[int]:
        """Images of each call so far."""
        return self.batch_sizes

    async def __call__(self, request: Request) -> Response:
        query = request.query_params
        try:
            image = await self.draw(query.get("prompt", ""), int(query.get("seed", 0)))
        except ValueError as error:
            return PlainTextResponse(str(error), status_code=400)
        file = io.BytesIO()
        image.save(file, "png")
        return Response(file.getvalue(), media_type="image/png")


def main() -> None:
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=DIGITS_CHECKPOINT, help="folder or repository of a pipeline")
    parser.add_argument("--device", help="default: CUDA where it is available")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    serve.start(http_options={"port": arguments.port})
    serve.run(Images.bind(arguments.model, arguments.device), blocking=True)


if __name__ == "__main__":
    main()
