// Vercel's AI SDK as a client of `qsun serve`.
import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "qsun",
  baseURL: `${process.env.QSUN_URL}/v1`,
  apiKey: "any-key-will-do",
  supportsStructuredOutputs: true,
});
const model = provider("base");
const common = { model, prompt: "calc 12+8", maxRetries: 0 };
const schema = z.object({ name: z.enum(["apple", "pear"]), pieces: z.number().int().min(1).max(9) });

assert.equal(typeof (await generateText({ ...common, maxOutputTokens: 8 })).text, "string");
const stream = streamText({ ...common, maxOutputTokens: 8, onError: ({ error }) => { throw error; } });
for await (const _ of stream.textStream);
const tools = { buy: tool({ description: "Buy fruit.", inputSchema: schema }) };
const forced = await generateText({ ...common, tools, toolChoice: "required" });
schema.parse(forced.toolCalls[0].input);
const streamed = streamText({ ...common, tools, toolChoice: { type: "tool", toolName: "buy" } });
schema.parse((await streamed.toolCalls)[0].input);
schema.parse((await generateObject({ ...common, schema })).object);
console.log("text, stream, tools, streamed tools, object");
