"""`contentv plan`: what a stage of training takes on a cluster, from formulas, before anything is launched."""
