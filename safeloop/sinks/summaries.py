"""TensorBoard's protocol buffers: scalars, text, layout, hyperparameters. Import only when a run opens."""

# mypy: disable-error-code=import-untyped
# tensorboard ships no types.

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.plugins.text import metadata as text_plugin

from safeloop.sinks.dashboard import Category, Chart


def scalars(values: Mapping[str, float]) -> Summary:
    """All values in one summary, each rounded to float32 as the format asks; beyond its range they are infinite."""
    return Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])


def text(tag: str, content: str, language: str = "") -> Summary:
    """`content` shown word for word, in a fixed font."""
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    markdown = f"{fence}{language}\n{content.rstrip()}\n{fence}\n"
    return _string(tag, markdown.encode(), text_plugin.create_summary_metadata("", ""), dims=(1,))


def layout(content: Sequence[Category]) -> Summary:
    """The dashboard that opens at `#custom_scalars`."""
    proto = layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=category.title, chart=[_chart(chart) for chart in category.charts])
            for category in content
        ]
    )
    tag = custom_scalar.CONFIG_SUMMARY_TAG
    return _string(tag, proto.SerializeToString(), custom_scalar.create_summary_metadata(), dims=())


def hparams_start(values: Mapping[str, str | int | float | bool]) -> Summary:
    """The hyperparameters of a run, in the run itself: `add_hparams` would make a run below it."""
    info = SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        setattr(info.hparams[name], f"{_kind(value)}_value", value)
    return _hparams(hparams.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=info))


def hparams_table(values: Mapping[str, str | int | float | bool], metrics: Iterable[str]) -> Summary:
    """The columns of the HParams tab: every hyperparameter, and these tags as metrics."""
    kinds = {"bool": api_pb2.DATA_TYPE_BOOL, "number": api_pb2.DATA_TYPE_FLOAT64, "string": api_pb2.DATA_TYPE_STRING}
    experiment = api_pb2.Experiment(
        hparam_infos=[api_pb2.HParamInfo(name=name, type=kinds[_kind(value)]) for name, value in values.items()],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics],
    )
    return _hparams(hparams.EXPERIMENT_TAG, HParamsPluginData(experiment=experiment))


def hparams_end(*, is_success: bool) -> Summary:
    """How the run ended, for the HParams tab."""
    status = api_pb2.STATUS_SUCCESS if is_success else api_pb2.STATUS_FAILURE
    info = SessionEndInfo(status=status, end_time_secs=time.time())
    return _hparams(hparams.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=info))


def _kind(value: str | float | bool) -> str:
    return "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"


def _chart(chart: Chart) -> layout_pb2.Chart:
    if chart.is_band:
        value, lower, upper = chart.tags
        series = layout_pb2.MarginChartContent.Series(value=value, lower=lower, upper=upper)
        return layout_pb2.Chart(title=chart.title, margin=layout_pb2.MarginChartContent(series=[series]))
    exactly = [f"^{re.escape(tag)}$" for tag in chart.tags]
    return layout_pb2.Chart(title=chart.title, multiline=layout_pb2.MultilineChartContent(tag=exactly))


def _string(tag: str, content: bytes, metadata: SummaryMetadata, dims: tuple[int, ...]) -> Summary:
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in dims])
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=shape)
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])


def _hparams(tag: str, content: HParamsPluginData) -> Summary:
    metadata = hparams.create_summary_metadata(content)
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=hparams.NULL_TENSOR)])
