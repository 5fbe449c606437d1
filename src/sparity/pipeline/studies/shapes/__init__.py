"""The shape of a model that this machine runs fast enough, or that is small enough: chosen before any is cut."""
