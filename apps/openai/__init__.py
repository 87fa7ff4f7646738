"""OpenAI's API for other people's programs: `/v1/chat/completions`, `/v1/completions` and `/v1/models`.

Devices answer, one for each answer under way; what they speak to decides what it costs. `isthmus serve --openai` runs
it in a process of its own, beside the cloud.
"""
