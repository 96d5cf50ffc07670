"""Local inference engines: plain transformers and vLLM.

A back end is made from ModelOptions (this loads the model) and then yields (sample, answer) pairs in any order, so
that every answer reaches the journal as soon as it is there. Both engines get the same text: the chat template of the
model's own processor. Images are decoded when an item is sent.
"""

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import batched, islice
from typing import Any, Literal, Protocol

from evaluation.benchmarks.samples import Request, Sample, build_request
from spatialthinker.multicast import WITHOUT_MULTICAST, nccl_only
from spatialthinker.prompts import IMAGE_MARK

WINDOW_BATCHES = 8
"""Batches that are decoded and sorted by length together: more of them waste less padding and hold more images."""
SENT_PER_STEP = 16
"""Requests added between two engine steps, so that preparing images never starves the engine."""
MAX_IN_FLIGHT = 512
"""Questions that vLLM holds at a time: it keeps the image's patches until the answer ends, 11 MB for 800 x 600."""
MAX_THREADS = 16
"""Threads that prepare images for a GPU's engine."""
_PIXELS_PER_TOKEN = 28 * 28
LOCAL = "local"


@dataclass(frozen=True)
class ModelOptions:
    """Options of the model and of decoding."""

    model_path: str
    template: str
    processor_name: str | None = None
    batch_size: int = 1
    max_tokens: int = 2048
    temperature: float = 0.0
    seed: int = 42
    images_per_prompt: int = 1
    concurrency: int = 32
    """Requests in flight at a time, for APIs."""
    base_url: str | None = None
    """Address of another server with the provider's API."""
    batch_file: str | None = None
    """File of the submitted batches; None sends requests one by one."""
    tensor_parallel_size: int = 1
    """GPUs that share one model, for vllm."""
    num_items: int = 0
    """Number of questions in the run."""
    ray_address: str = LOCAL
    """Ray cluster of the engines; LOCAL is none but one of their own, on this machine."""


@dataclass(frozen=True)
class Answer:
    """The answer to one item: either a text or an error."""

    prompt: str = ""
    text: str = ""
    finish_reason: str | None = None
    """"stop" or "length"."""
    prompt_tokens: int = 0
    response_tokens: int = 0
    cost_usd: float = 0.0
    seconds: float = 0.0
    """From sending to answer; of a batch, its whole time."""
    error: str | None = None


class Backend(Protocol):
    """Interface of an inference engine."""

    def answer(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Answer]]:
        """Yield each sample's answer as soon as it is complete.

        A back end may have a method `stop`, called by a signal's handler: what is under way then ends the answers.
        """
        ...


def load_processor(options: ModelOptions) -> Any:
    """Return the model's processor. Errors: ValueError where there is none."""
    from transformers import AutoProcessor

    name = options.processor_name or options.model_path
    try:
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: no processor can be loaded: {str(error).splitlines()[0]}") from error
    if getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"{name}: has no image processor with a tokenizer; is it a vision-language model?")
    return processor


def render_chat(processor: Any, request: Request) -> str:
    """Return the chat text of one user turn, every image mark replaced by the model's own placeholder.

    The beginning of the reply follows where it is given.
    """
    content: list[dict[str, str]] = []
    for piece in re.split(f"({re.escape(IMAGE_MARK)})", request.prompt):
        if piece == IMAGE_MARK:
            content.append({"type": "image"})
        elif piece:
            content.append({"type": "text", "text": piece})
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + request.prefix


class HuggingFaceBackend:
    """Plain transformers generation in left-padded batches, on the GPU or the CPU."""

    def __init__(self, options: ModelOptions) -> None:
        import torch
        from transformers import AutoModelForImageTextToText

        self.options = options
        self.processor = load_processor(options)
        self.processor.tokenizer.padding_side = "left"
        has_gpu = torch.cuda.is_available()
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            options.model_path,
            dtype="auto" if has_gpu else torch.float32,
            attn_implementation="flash_attention_2" if has_gpu and find_spec("flash_attn") else "sdpa",
        )
        self.model.to("cuda" if has_gpu else "cpu").eval()
        torch.manual_seed(options.seed)
        self._is_stopped = False

    def stop(self) -> None:
        """End with the batch under way."""
        self._is_stopped = True

    def answer(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Answer]]:
        """Yield answers batch by batch; inside a window of batches the longest prompts go first."""
        for window in batched(samples, self.options.batch_size * WINDOW_BATCHES):
            requests = []
            for sample in window:
                try:
                    requests.append((sample, build_request(sample, self.options.template)))
                except ValueError as error:
                    yield sample, item_error(sample, error)
            requests.sort(key=lambda pair: _estimate_tokens(pair[1]), reverse=True)
            for batch in batched(requests, self.options.batch_size):
                if self._is_stopped:
                    return
                yield from self._answer_batch(batch)

    def _answer_batch(self, batch: Sequence[tuple[Sample, Request]]) -> Iterator[tuple[Sample, Answer]]:
        """Yield the answers of a batch, one by one where it has an item that the processor refuses."""
        try:
            answers = self._generate([request for _, request in batch])
        except ValueError as error:  # such as an image 200 times as long as it is wide
            if len(batch) == 1:
                yield batch[0][0], item_error(batch[0][0], error)
                return
            for pair in batch:
                yield from self._answer_batch([pair])
            return
        yield from zip((sample for sample, _ in batch), answers, strict=True)

    def _generate(self, requests: Sequence[Request]) -> list[Answer]:
        import torch

        start = time.monotonic()
        texts = [render_chat(self.processor, request) for request in requests]
        images = [request.images for request in requests]
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt").to(self.model.device)
        options = self.options
        sampling: dict[str, Any] = {"do_sample": True, "temperature": options.temperature}
        if options.temperature == 0:
            sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=options.max_tokens, **sampling)
        responses = output[:, inputs["input_ids"].shape[1] :]  # [batch, response tokens]
        stop_ids = self.model.generation_config.eos_token_id or self.processor.tokenizer.eos_token_id
        is_stop = torch.isin(responses, torch.as_tensor(stop_ids, device=responses.device))
        decoded = self.processor.batch_decode(responses, skip_special_tokens=True)
        seconds = time.monotonic() - start
        answers = []
        for index, (request, text) in enumerate(zip(requests, decoded, strict=True)):
            stops = is_stop[index].nonzero()
            answers.append(
                Answer(
                    prompt=request.prompt,
                    text=request.prefix + text,
                    finish_reason="stop" if len(stops) else "length",
                    prompt_tokens=int(inputs["attention_mask"][index].sum()),
                    response_tokens=int(stops[0]) + 1 if len(stops) else responses.shape[1],
                    seconds=seconds,
                )
            )
        return answers


def item_error(sample: Sample, error: ValueError) -> Answer:
    """Return a fault of one item as its answer; it names the item."""
    text = str(error)
    return Answer(error=text if f"item {sample.id}" in text else f"item {sample.id}: {text}")


def _estimate_tokens(request: Request) -> float:
    return len(request.prompt) / 4 + sum(image.width * image.height for image in request.images) / _PIXELS_PER_TOKEN


def _cpu_type(model_path: str) -> Literal["bfloat16", "float32"]:
    """Return the type in which vLLM computes the model on a CPU, linear attention in bfloat16 alone."""
    from transformers import AutoConfig

    layers = getattr(AutoConfig.from_pretrained(model_path).get_text_config(), "layer_types", None) or []
    return "bfloat16" if "linear_attention" in layers else "float32"


class VllmBackend:
    """vLLM's continuous batching over the whole set; at most MAX_IN_FLIGHT questions are in memory at a time."""

    def __init__(self, options: ModelOptions) -> None:
        import torch

        has_gpu = torch.cuda.is_available()
        _set_engine_environment(has_gpu)
        self.options = options
        self.num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0))) if has_gpu else 1
        self.processor = load_processor(options)
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.llm = LLM(
            options.model_path,
            dtype="auto" if has_gpu else _cpu_type(options.model_path),
            mamba_ssm_cache_dtype="float32",  # states of linear attention
            seed=options.seed,
            tensor_parallel_size=options.tensor_parallel_size,
            max_model_len=-1,  # the model's own length, or what fits into the cache
            limit_mm_per_prompt={"image": options.images_per_prompt, "video": 0},
            mm_processor_cache_gb=0,  # every image is seen once
            enforce_eager=not has_gpu,
            skip_mm_profiling=not has_gpu,
            disable_log_stats=True,
            **nccl_only(options.tensor_parallel_size),
        )
        defaults = self.llm.model_config.get_diff_sampling_param()
        if options.temperature == 0:  # as transformers does: only what still has a meaning for greedy decoding
            defaults = {key: value for key, value in defaults.items() if key == "repetition_penalty"}
        # vLLM's CPU sampler refuses seeds of single requests in larger batches; the engine's seed covers it there.
        seed = options.seed if has_gpu and options.temperature > 0 else None
        choices = {"temperature": options.temperature, "max_tokens": options.max_tokens, "seed": seed}
        # Text piece by piece as it grows is for chats: on a GPU it takes three times as long as the answers.
        choices |= {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        self.sampling = SamplingParams(**(defaults | choices))
        self._is_stopped = False

    def stop(self) -> None:
        """Add nothing more to the engine."""
        self._is_stopped = True

    def answer(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Answer]]:
        """Yield answers in the order in which the engine finishes them."""
        engine = self.llm.llm_engine
        limit = min(MAX_IN_FLIGHT, 2 * engine.vllm_config.scheduler_config.max_num_seqs)
        in_flight: dict[str, tuple[Sample, str, float]] = {}
        pool = ThreadPoolExecutor(self.num_threads)
        coming = _in_threads(pool, self._prepare, samples, ahead=2 * SENT_PER_STEP)
        is_exhausted = False
        try:
            while in_flight or not (is_exhausted or self._is_stopped):
                for _ in range(0 if self._is_stopped else min(SENT_PER_STEP, limit - len(in_flight))):
                    sample, prepared = next(coming, (None, None))
                    if sample is None or prepared is None:
                        is_exhausted = True
                        break
                    try:
                        prompt, engine_input = prepared.result()
                        request_id = str(next(self.llm.request_counter))
                        engine.add_request(request_id, engine_input, self.sampling)
                        in_flight[request_id] = sample, prompt, time.monotonic()
                    except ValueError as error:  # an unreadable image, a prompt beyond the model's length
                        yield sample, item_error(sample, error)
                for output in engine.step() if in_flight else ():
                    sample, prompt, sent = in_flight.pop(output.request_id)
                    answer = self._read(output, prompt, time.monotonic() - sent)
                    yield sample, replace(answer, text=sample.prefix + answer.text)
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, sample: Sample) -> tuple[str, Any]:
        """The prompt and what the engine takes: token ids and patches. Most of it is work on the image."""
        request = build_request(sample, self.options.template)
        ids = self.processor.tokenizer(render_chat(self.processor, request))["input_ids"]
        prompt: Any = {"prompt_token_ids": ids, "multi_modal_data": {"image": request.images}}
        return request.prompt, self.llm.renderer.render_cmpl([prompt])[0]

    def _read(self, output: Any, prompt: str, seconds: float) -> Answer:
        completion = output.outputs[0]
        return Answer(
            prompt=prompt,
            text=self.processor.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            finish_reason=completion.finish_reason,
            prompt_tokens=len(output.prompt_token_ids or ()),
            response_tokens=len(completion.token_ids),
            seconds=seconds,
        )


def _in_threads(
    pool: ThreadPoolExecutor, function: Callable[[Sample], Any], samples: Iterable[Sample], ahead: int
) -> Iterator[tuple[Sample, Future[Any]]]:
    """Yield each sample, in order, with its result to come; so many of the next are worked on meanwhile."""
    waiting = iter(samples)
    coming = deque((sample, pool.submit(function, sample)) for sample in islice(waiting, ahead))
    while coming:
        yield coming.popleft()
        coming.extend((sample, pool.submit(function, sample)) for sample in islice(waiting, 1))


def _set_engine_environment(has_gpu: bool) -> None:
    """Set what vLLM reads when it is imported; what the user has set stays."""
    settings = {"VLLM_LOGGING_LEVEL": "WARNING", **WITHOUT_MULTICAST}
    if not has_gpu:
        settings["VLLM_LOGGING_LEVEL"] = "ERROR"  # at WARNING the CPU engine writes two lines a request
        # One process on all cores: a second one, its own thread binding and the large default cache are for servers.
        settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        settings["VLLM_CPU_KVCACHE_SPACE"] = "1"
        # The compiler's probing of the CPU takes 20 s and more of each start, longer than most CPU runs gain from it.
        settings["TORCH_COMPILE_DISABLE"] = "1"
    else:
        settings["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork could not use a GPU that we have asked for
        if find_spec("flashinfer") is None:
            settings["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    for key, value in settings.items():
        os.environ.setdefault(key, value)
