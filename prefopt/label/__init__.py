"""AI labels (RLAIF): a language model, or any reward, says which of two completions is better.

`prefopt label` is the command; from Python: `build_labeller`, `label_rows`, `measure_labels`, `preference_rows`.
"""
