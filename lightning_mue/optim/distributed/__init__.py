"""The optimizer over several ranks: layouts of parameters, assignment of the work, communication."""
