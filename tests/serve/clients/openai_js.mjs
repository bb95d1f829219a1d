// OpenAI's own npm package as a client of `qsun serve`.
import assert from "node:assert";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.QSUN_URL}/v1`, apiKey: "any-key-will-do", maxRetries: 0 });
const messages = [{ role: "user", content: "calc 12+8" }];
const schema = {
  type: "object",
  properties: { name: { enum: ["apple", "pear"] }, pieces: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["name", "pieces"],
  additionalProperties: false,
};
const tools = [{ type: "function", function: { name: "buy", parameters: schema } }];

assert.equal((await client.models.list()).data[0].id, "base");
let text = "";
const stream = await client.chat.completions.create({ model: "base", messages, max_tokens: 8, stream: true });
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
const forced = await client.chat.completions.create({ model: "base", messages, tools, tool_choice: "required" });
assert(JSON.parse(forced.choices[0].message.tool_calls[0].function.arguments).pieces >= 1);
const runner = client.chat.completions.stream({ model: "base", messages, tools, tool_choice: "required" });
assert.equal((await runner.finalChatCompletion()).choices[0].finish_reason, "tool_calls");
const response_format = { type: "json_schema", json_schema: { name: "fruit", schema, strict: true } };
const parsed = await client.chat.completions.parse({ model: "base", messages, response_format });
assert(JSON.parse(parsed.choices[0].message.content).name);
const response = await client.responses.create({ model: "base", input: "calc 1+1", max_output_tokens: 8 });
assert.equal(typeof response.output_text, "string");
const events = [];
for await (const event of await client.responses.create({ model: "base", input: "x", max_output_tokens: 8, stream: true }))
  events.push(event.type);
assert(["response.completed", "response.incomplete"].includes(events.at(-1)));
console.log("models, stream, tools, parse, responses");
