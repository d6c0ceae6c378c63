"""Loss functions of arrays: of tokens, of pairs of answers, of sampled answers, and of a teacher's probabilities."""
