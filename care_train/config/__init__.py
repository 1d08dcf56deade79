"""A run's settings: one frozen dataclass per section, and how they are read.

    Config and its sections    what can be set, with each setting's meaning, default and bounds
    load_config                defaults < Table 5 < preset < YAML file < `section.key=value`

Nothing here needs torch, and nothing of care_train outside this package is imported.
"""

from care_train.config.base import FROM_PYTHON, SHIPPED_REWARDS, Role
from care_train.config.care import (
    PRESETS,
    TABLE_5,
    Algorithm,
    CareSettings,
    Decisions,
    LossSettings,
    ReflectionSettings,
    Selector,
)
from care_train.config.data import (
    LEVELS,
    SHIPPED_DATA,
    Adapter,
    BenchmarkName,
    BuildSettings,
    CleanSettings,
    DataSettings,
    DedupSettings,
    EvalSettings,
    Source,
    SourceSettings,
    hub_data,
    source_of,
)
from care_train.config.keys import Key, find_key, full_help, list_keys, role_of, short_help
from care_train.config.loader import (
    build_config,
    config_files,
    config_to_dict,
    config_to_yaml,
    configs_folder,
    dotted,
    load_build_settings,
    load_config,
    merge,
    merge_config,
    names_run,
)
from care_train.config.model import (
    LoraSettings,
    ModelSettings,
    PromptSettings,
    RolloutSettings,
    VllmSettings,
)
from care_train.config.reward import (
    AnswerTypeName,
    JudgeSettings,
    RewardFunctionSettings,
    RewardSettings,
)
from care_train.config.run import Config, HubSettings, LimitSettings, LoggingSettings
from care_train.config.training import DeepSpeedSettings, SftSettings, TrainSettings

__all__ = [
    "FROM_PYTHON",
    "LEVELS",
    "PRESETS",
    "SHIPPED_DATA",
    "SHIPPED_REWARDS",
    "TABLE_5",
    "Adapter",
    "Algorithm",
    "AnswerTypeName",
    "BenchmarkName",
    "BuildSettings",
    "CareSettings",
    "CleanSettings",
    "Config",
    "DataSettings",
    "Decisions",
    "DedupSettings",
    "DeepSpeedSettings",
    "EvalSettings",
    "HubSettings",
    "JudgeSettings",
    "Key",
    "LimitSettings",
    "LoggingSettings",
    "LoraSettings",
    "LossSettings",
    "ModelSettings",
    "PromptSettings",
    "ReflectionSettings",
    "RewardFunctionSettings",
    "RewardSettings",
    "Role",
    "RolloutSettings",
    "Selector",
    "SftSettings",
    "Source",
    "SourceSettings",
    "TrainSettings",
    "VllmSettings",
    "build_config",
    "config_files",
    "config_to_dict",
    "config_to_yaml",
    "configs_folder",
    "dotted",
    "find_key",
    "full_help",
    "hub_data",
    "list_keys",
    "load_build_settings",
    "load_config",
    "merge",
    "merge_config",
    "names_run",
    "role_of",
    "short_help",
    "source_of",
]
