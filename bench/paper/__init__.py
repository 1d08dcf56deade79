"""The paper's tables and figures in small: real runs of the trainer on strips of digits."""
