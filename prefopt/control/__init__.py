"""Sequential control: segments of states and actions are the sequences, steps are the tokens.

The steps of an offline data set stand in one table, and a step's number in it is what a token's id is to language: an example's
completion is a segment, written as the numbers of its steps. Packing, streams, the reference cache, losses and the trainer
then serve control as they serve text; only the policy knows that a number stands for an observation and an action.
"""
