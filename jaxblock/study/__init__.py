"""Runs studies: grids of training runs and their evaluations, compared with statistics that hold for few seeds."""
