"""From questions to a record that can be believed: answers, scores, intervals, paired comparisons."""
