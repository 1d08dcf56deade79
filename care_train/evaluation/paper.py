"""The paper's Tables 1 and 2, to stand beside a run's numbers. Percent; None was not reported."""

Row = tuple[str, tuple[float | None, ...]]
"""A model, and its accuracy on the six benchmarks in the order of `BENCHMARKS`."""

TABLE_1: tuple[Row, ...] = (
    ("GPT-4o", (63.8, 37.6, None, None, None, None)),
    ("GPT-5-Nano", (73.1, None, 59.7, 72.6, None, None)),
    ("Claude-Sonnet-3.7", (66.8, None, 41.9, 75.0, None, None)),
    ("Gemini-2.0-Pro", (71.3, 67.3, 48.1, 69.9, None, None)),
    ("Qwen2.5-VL-3B", (62.0, 47.6, 21.2, 46.4, 31.1, 21.3)),
    ("Qwen2.5-VL-7B", (68.6, 49.2, 22.4, 61.3, 36.3, 32.8)),
    ("Qwen3-VL-4B-Instruct", (73.7, 46.8, 51.6, 67.4, None, None)),
    ("Qwen3-VL-8B-Instruct", (77.2, 62.1, 53.9, 69.6, None, None)),
    ("InternVL3.5-8B-Instruct", (74.2, None, 46.4, 68.1, None, None)),
    ("MiMo-VL-7B-SFT", (81.8, 67.1, 57.9, 64.6, 45.2, 39.4)),
    ("LLaVA-OneVision-1.5 8B", (69.6, None, 25.6, 55.4, 37.4, 25.2)),
    ("DeepEyes", (70.1, 47.3, 26.6, None, None, None)),
    ("M2-Reasoning", (75.0, None, 31.5, None, None, None)),
    ("Qwen3-VL-4B-Thinking", (79.5, 75.2, 60.0, 70.8, None, None)),
    ("Qwen3-VL-8B-Thinking", (81.4, 77.7, 62.7, 74.1, None, None)),
    ("MiMo-VL-7B-RL", (81.5, 71.5, 60.4, 66.7, 46.2, 40.3)),
    ("Vision-R1-7B", (73.5, None, None, None, None, None)),
    ("Keye-VL-1.5-8B", (80.7, 59.8, 46.0, 71.4, None, None)),
    ("InternVL3.5-8B-MPO", (74.2, None, 46.4, 71.2, None, None)),
    ("Qwen2.5-VL-7B + GRPO", (68.9, 50.8, 25.7, 61.1, 36.4, 32.8)),
    ("Qwen2.5-VL-7B + DAPO", (72.6, 54.2, 29.4, 61.6, 37.3, 34.7)),
    ("Qwen2.5-VL-7B + GSPO", (74.1, 56.0, 31.6, 62.2, 38.9, 36.4)),
    ("Qwen2.5-VL-3B + CARE", (66.5, 49.9, 25.0, 47.2, 33.1, 24.0)),
    ("Qwen2.5-VL-7B + CARE", (74.7, 56.8, 32.6, 62.5, 39.7, 37.1)),
    ("Qwen3-VL-8B-Instruct + CARE", (82.1, 69.7, 61.7, 71.0, 46.7, 41.7)),
)
"""All rows of Table 1."""

TABLE_2: tuple[Row, ...] = (
    ("Qwen2.5-VL-3B + GRPO", (63.5, 47.9, 22.4, 45.4, 31.9, 21.9)),
    ("Qwen2.5-VL-3B + CARE w/o RGR", (65.3, 48.2, 24.7, 47.4, 32.2, 23.1)),
    ("Qwen2.5-VL-7B + CARE w/o RGR", (74.3, 55.4, 31.9, 62.8, 38.3, 36.4)),
)
"""The rows of Table 2 that Table 1 lacks."""
