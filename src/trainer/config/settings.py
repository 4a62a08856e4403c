"""A training config: all of its sections, which the `settings_*` modules beside this one describe.

There each setting has its type, meaning, unit and default. Only values live in them, and of each
value alone its type and range. `load` reads the file, `validation` names the mistakes in it, and
`conflicts` knows which settings leave others without effect. Relative paths count from the current
directory, as on a command line.
"""

from pydantic import Field

from trainer.config.section import MOST, Section, SettingPath, checked_path
from trainer.config.settings_cache import CacheSettings
from trainer.config.settings_data import CaptionSettings, DataSettings, TextSettings
from trainer.config.settings_loss import LossSettings, NoiseSettings
from trainer.config.settings_model import RANDOM, ModelSettings, family_of
from trainer.config.settings_optimizer import OptimizerSettings, ScheduleArguments
from trainer.config.settings_output import (
    CheckpointSettings,
    ExportSettings,
    LogSettings,
    SamplePrompt,
    SampleSettings,
    ValidationSettings,
)
from trainer.config.settings_train import EmaSettings, EngineSettings, SpeedSettings, TrainSettings

__all__ = [
    "MOST",
    "RANDOM",
    "CacheSettings",
    "CaptionSettings",
    "CheckpointSettings",
    "Config",
    "DataSettings",
    "EmaSettings",
    "EngineSettings",
    "ExportSettings",
    "LogSettings",
    "LossSettings",
    "ModelSettings",
    "NoiseSettings",
    "OptimizerSettings",
    "SamplePrompt",
    "SampleSettings",
    "ScheduleArguments",
    "Section",
    "SettingPath",
    "SpeedSettings",
    "TextSettings",
    "TrainSettings",
    "ValidationSettings",
    "checked_path",
    "family_of",
]


class Config(Section):
    """A whole run."""

    model: ModelSettings
    data: tuple[DataSettings, ...] = Field(min_length=1, strict=False)
    caption: CaptionSettings = CaptionSettings()
    text: TextSettings = TextSettings()
    noise: NoiseSettings = NoiseSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings
    speed: SpeedSettings = SpeedSettings()
    engine: EngineSettings = EngineSettings()
    ema: EmaSettings = EmaSettings()
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()
    samples: SampleSettings = SampleSettings()
    log: LogSettings = LogSettings()
    cache: CacheSettings = CacheSettings()

    def caption_of(self, dataset: int) -> CaptionSettings:
        """`[caption]` with the changes that `data.<dataset>.caption` makes to it."""
        own = self.data[dataset].caption
        return self.caption.model_copy(
            update={name: getattr(own, name) for name in own.model_fields_set}
        )
