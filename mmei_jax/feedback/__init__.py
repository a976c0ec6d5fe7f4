"""Feedback: logged decisions, policies that learn from them, and what those would have earned."""
