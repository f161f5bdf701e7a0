"""What a program embeds: a model, its conversation, and how tokens are drawn from it."""
