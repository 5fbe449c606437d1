"""`SparsityManager`: the specification's interface, carried out by Sparity's recipes, engine and measurements."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparity.errors import CorruptFile, InvalidInput, wrong_input
from sparity.files import expand, read_json_object
from sparity.integrations.sagellm import layers, meaning
from sparity.integrations.sagellm.loaded import SparseModel, load_bound
from sparity.integrations.sagellm.performance import TEXT, WINDOWS, text_of
from sparity.integrations.sagellm.protocol import SparsityConfig, SparsityProtocol
from sparity.integrations.sagellm.selector import DeviceInfo, kernel_for_backend
from sparity.measure.timing.contenders import held_bytes
from sparity.measure.timing.speed import compare_speed
from sparity.models import Decoder
from sparity.models import transformers as hf
from sparity.models.loading import load
from sparity.pipeline.run.export import RECORD, finished_report
from sparity.pipeline.run.job import prepare
from sparity.pipeline.run.runner import run
from sparity.pipeline.run.verify import verify
from sparity.quality.agreement import compare
from sparity.recipe import Recipe, SpeedTest
from sparity.visible import logger

log = logger(__name__)
OUTPUT = "sparse-models"  # the folder, in the current one, for what is made
DRAWN: Mapping[str, Any] = {"documents": "joined", "batch": 8}  # of calibration texts, over a recipe's defaults


class SparsityManager(SparsityProtocol):
    """Prune, load, check and report, as sageLLM's module specification 3.2 asks.

    Args:
        config: what is done where a method is given no other.
        output: the folder in which every model gets a folder of its own, named by what was done to it. What is there
            already is not made again.
        dtype: the type in which models are pruned and saved, as in a recipe; the engine runs bfloat16.
        layout: the format in which weights are held in memory, over the configuration's: "smallest",
            "fastest" or a name.
        calibration: keys of a recipe's `calibration` over those that the configuration gives, such as {"samples": 32}.
        text: what quality is measured on; a file, a data set, a bundled text or a .npy file of ids.
        window: tokens per window; None is 2048, or the context if that is less.
        windows: of the text, from its beginning.
        speed: prompt, tokens and rounds, as a recipe's `measure.speed`.
    """

    def __init__(
        self,
        config: SparsityConfig,
        *,
        output: str | Path = OUTPUT,
        dtype: str = "auto",
        layout: str | None = None,
        calibration: Mapping[str, Any] | None = None,
        text: str = TEXT,
        window: int | None = None,
        windows: int = WINDOWS,
        speed: Mapping[str, Any] | None = None,
    ) -> None:
        meaning.check(config)
        self.config = config
        self.measured_by: dict[str, Any] = {
            "text": text,
            "window": window,
            "windows": windows,
            "speed": None if speed is None else SpeedTest.model_validate(dict(speed)),
        }
        self.notes: list[str] = []
        self._output, self._dtype, self._layout = expand(output), dtype, layout
        self._calibration = dict(calibration or {})
        self._pruned: tuple[str, SparsityConfig] | None = None
        self._loaded: SparseModel | None = None

    @wrong_input()
    def prune(self, model_path: str, config: SparsityConfig | None = None) -> str:
        """Prune a model; the folder of the sparse one, an ordinary Hugging Face checkpoint with `sparity.json`.

        Raises:
            SparityError: as of `sparity.run`; or a configuration that says nothing about weights.
        """
        config = self._checked(config)
        decoder = Decoder.open(hf.locate(model_path), dtype=self._dtype)
        left = layers.left_dense(decoder, config.target_layers, config.exclude_layers)
        recipe: dict[str, Any] = {
            "model": str(model_path),
            "dtype": self._dtype,
            "stages": meaning.stages(config, left, layers.widths(decoder)),
            "measure": {"speed": None},
        }
        if config.calibration_dataset is not None:
            recipe["calibration"] = {"text": config.calibration_dataset, **DRAWN, **self._calibration}
        path = str(make(recipe, self._output))
        if config.backend == "tensorrt":
            self._note(f"{meaning.NO_ENGINE}; exported to {path}")
        self._pruned, self._loaded = (path, config), None
        return path

    @wrong_input()
    def load_sparse_model(self, model_path: str, config: SparsityConfig | None = None) -> SparseModel:
        """Load a model, put it on the engine and attach what skips activations.

        Raises:
            InvalidInput: backend "tensorrt", which only exports.
            SparityError: as of `sparity.load` and `sparity.attach`.
        """
        config = self._checked(config)
        kernel = self.select_kernel(config)
        self._loaded = load_bound(model_path, config, kernel, self._layout)
        return self._loaded

    @wrong_input()
    def verify_sparsity(self, model_path: str) -> dict[str, float]:
        """The share of zeros of every projection, as `{"layer.0.mlp.up_proj": 0.5, ...}`.

        A folder that Sparity wrote is held against its record too.

        Raises:
            CorruptFile: it is not what was written.
        """
        folder = hf.locate(model_path)
        if (Path(folder) / RECORD).is_file() and (problems := verify(folder).problems):
            raise CorruptFile(f"{model_path}: {problems[0]} ({len(problems)} such problems): make it again")
        return {name: zeros / size for name, zeros, size in layers.counted(folder)}

    def select_kernel(self, config: SparsityConfig | None = None) -> str:
        """The specification's name of the best kernel here: its own choice, in Triton's place where `backend` says so.

        A name for CUDA says what the specification would run; what does run is `SparseModel.runs`.

        Raises:
            InvalidInput: backend "tensorrt", for which nothing is run.
        """
        config = self._checked(config)
        if config.backend == "tensorrt":
            raise InvalidInput(meaning.NO_ENGINE)
        return kernel_for_backend(config, DeviceInfo.here())

    @wrong_input()
    def report(self) -> dict[str, float]:
        """What was done to the model that was pruned or loaded last.

        `avg_sparsity` over the projections that have zeros; `speedup` (decoding) and `speedup_prefill` (to the first
        token) over the dense model in transformers, in turns; `speedup_over_dense_kernels`, decoding over the same
        engine with dense weights, where that runs; `perplexity` and `perplexity_delta`, relative to dense, 0.05 = 5 %;
        `memory_saving`, of the weights in memory. Of an export for TensorRT only `avg_sparsity`.

        Raises:
            InvalidInput: nothing was pruned or loaded, or the dense model is not known or not there.
        """
        if self._loaded is None and self._pruned is None:
            raise InvalidInput("nothing to report: prune or load a model first")
        if self._loaded is None and self._pruned is not None:
            path, config = self._pruned
            if config.backend == "tensorrt":
                return {"avg_sparsity": average_sparsity(path)}
            self.load_sparse_model(path, config)
        assert self._loaded is not None
        sparse = self._loaded
        dense = load(self._dense_of(sparse.path), dtype=sparse.model.dtype)
        how = self.measured_by
        measured = text_of(sparse.model, how["text"], how["window"], how["windows"])
        quality = compare(dense, sparse.model, measured.ids, measured.window)
        test = how["speed"] or SpeedTest.fitting(hf.context_length(dense.config))
        speed = compare_speed(dense, sparse.model, measured.ids, test.prompt, test.tokens, test.rounds, test.batch[0])
        found = {
            "avg_sparsity": average_sparsity(sparse.path),
            "speedup": speed.decode_ratio.median,
            "speedup_prefill": speed.first_token_ratio.median,
            "perplexity": quality.perplexity,
            "perplexity_delta": quality.perplexity / quality.dense_perplexity - 1,
            "memory_saving": 1 - held_bytes(sparse.model) / held_bytes(dense),
        }
        if speed.engine_dense is not None:
            found["speedup_over_dense_kernels"] = speed.engine_dense.decode_ratio.median
        return found

    def _checked(self, config: SparsityConfig | None) -> SparsityConfig:
        chosen = self.config if config is None else config
        meaning.check(chosen)
        return chosen

    def _dense_of(self, path: str) -> str:
        """The model that a sparse one was made of, through all runs on record; one without a record is its own."""
        while (Path(path) / RECORD).is_file():
            path = finished_report(Path(path)).model
        return path

    def _note(self, text: str) -> None:
        self.notes.append(text)
        log.warning("%s", text)


def average_sparsity(path: str) -> float:
    """The share of zeros over the projections of a model that have some; 0 where none has."""
    counts = [(zeros, size) for _, zeros, size in layers.counted(path) if zeros]
    return sum(zeros for zeros, _ in counts) / max(sum(size for _, size in counts), 1)


def make(recipe: Mapping[str, Any], output: Path) -> Path:
    """Carry a recipe out in a folder of its own within `output`, or find it done."""
    said = json.dumps(recipe, sort_keys=True).encode()
    stem = "".join(sign if sign.isalnum() or sign in "-." else "-" for sign in Path(recipe["model"]).name)
    place = output / f"{stem}-{hashlib.sha256(said).hexdigest()[:12]}"
    if (place / RECORD).is_file():
        wanted = json.loads(json.dumps(prepare(Recipe.read(recipe), device="cpu").identity()))
        if read_json_object(place / RECORD).get("identity") == wanted:
            return place
    return run(recipe, output=place, device="cpu", resume=True).path
