"""What the playground keeps and computes, without any widget: text as tokens, roads, looks into the model, costs."""
